"""An engine on each of two ranks that train together, "vllm" or "sglang"."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from guests import installed, settings
from ranks_program import CASE, PROMPTS, SAMPLING

from lightrft.strategy import Prompt, StrategyConfig, get_strategy
from lightrft.testing.cases.policies import build_policy

ENGINE = installed("vllm", "sglang")

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # other people's packages warn while they are imported
    pytest.mark.timeout(900),  # three processes import the engine, on cores that others may have
]


def test_each_rank_of_sharded_training_has_its_engine(tmp_path: Path) -> None:
    """Under fsdp2 on two ranks completions are those of one process, and logprobs the trainer's after every sync."""
    program = Path(__file__).with_name("ranks_program.py")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    subprocess.run([*launcher, str(program), str(tmp_path), ENGINE], check=True, timeout=600)  # noqa: S603 (our own program)
    seen = [json.loads((tmp_path / f"rank{rank}.json").read_text(encoding="utf-8")) for rank in range(2)]
    strategy = get_strategy(StrategyConfig(strategy="single"))
    with strategy.setup_inference_engine(settings(ENGINE), actor=build_policy(CASE)) as handle:
        whole = strategy.gather_and_generate(handle, [Prompt(token_ids=ids) for ids in PROMPTS], SAMPLING)
    assert [tuple(ids) for rank in seen for ids in rank["made"]] == [completion.token_ids for completion in whole]
    assert max(difference for rank in seen for difference in rank["differences"]) < 1e-5
    assert seen[0]["differences"] == seen[1]["differences"]
    assert [rank["later"] for rank in seen] != [rank["made"] for rank in seen]
