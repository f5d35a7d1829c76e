"""What the algorithms refuse before they compute."""

from __future__ import annotations

import pytest
import torch

from lightrft.algorithms import ADVANTAGES, IMPORTANCE_CORRECTIONS, KL_ESTIMATORS, LOSSES, rloo, select
from lightrft.algorithms.shapes import require_ndim, require_same_shape
from lightrft.errors import ConfigError


def test_select_returns_what_the_name_stands_for() -> None:
    """A known name gives the function of the mapping."""
    assert select(ADVANTAGES, "rloo", setting="advantage") is rloo


def test_select_names_the_nearest() -> None:
    """An unknown name is an error that gives the setting, the nearest name and all known ones."""
    message = r"^advantage='gprpo' is not known; did you mean 'grpo'\? Known: dr_grpo, grpo, reinforce\+\+, rloo\.$"
    with pytest.raises(ConfigError, match=message):
        select(ADVANTAGES, "gprpo", setting="advantage")


def test_every_mapping_is_read_only() -> None:
    """The mappings cannot be written to, so importing a module cannot change what a name means."""
    for mapping in (ADVANTAGES, LOSSES, KL_ESTIMATORS, IMPORTANCE_CORRECTIONS):
        assert not hasattr(mapping, "__setitem__")


def test_shapes_and_dimensions() -> None:
    """Equal shapes and the right number of dimensions pass; the first that differs is named."""
    require_same_shape(a=torch.zeros(2), b=torch.zeros(2))
    require_ndim(1, a=torch.zeros(2), b=torch.zeros(3))
    with pytest.raises(ConfigError, match=r"^b.shape=\(\) differs from a.shape=\(2,\); pass tensors of one shape.$"):
        require_same_shape(a=torch.zeros(2), b=torch.zeros(()))
    with pytest.raises(ConfigError, match=r"^b.shape=\(1, 2\) has not 1 dimension"):
        require_ndim(1, a=torch.zeros(2), b=torch.zeros(1, 2))
