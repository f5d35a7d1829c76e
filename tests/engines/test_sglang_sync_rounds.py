"""Weights arrive in SGLang, for every kind of model: `make test-sglang`."""

from __future__ import annotations

import pytest
import sync_rounds

from lightrft.backends.rollout.sglang_package import require_sglang
from lightrft.config import EngineConfig
from lightrft.errors import MissingPackageError
from lightrft.testing.conformance.hold import run_on
from lightrft.testing.subject import subject_of

try:
    require_sglang()
except MissingPackageError as missing:
    pytest.skip(str(missing), allow_module_level=True)

pytestmark = pytest.mark.filterwarnings("ignore")

ENGINE = EngineConfig(type="sglang", cache_gb=0.01, batch_size=8)


def test_after_rounds_of_training_the_engine_is_the_trainer() -> None:
    """After each of 20 rounds logprobs are the trainer's within 1e-5, and the trainer is as it was to the bit."""
    subject = subject_of("single", "strategy", engine=ENGINE)
    with run_on(subject, "here", 1) as run:
        for kind in sync_rounds.KINDS:
            for seen in run(sync_rounds.run, sync_rounds.Case(kind=kind, num_rounds=20)):
                assert max(seen.probed) < 1e-5, kind
                assert max(seen.differences) < 1e-5, kind
                assert seen.moved > 1e-2, kind
                assert seen.kept, kind
