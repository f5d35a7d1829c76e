"""The memory of a run: what is estimated is what real tensors take."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from pathlib import Path
from types import ModuleType

import attrs
import pytest
import torch

from lightrft.backends.checkpointing.snapshot import Snapshot, snapshot_of
from lightrft.backends.checkpointing.writing import CheckpointContent
from lightrft.config import AlgorithmConfig, CheckpointConfig, Config, EngineConfig, ModelConfig, StrategyConfig
from lightrft.errors import ConfigError
from lightrft.models.build import build_model_and_tokenizer
from lightrft.planning.measure import local_bytes, measure_step
from lightrft.planning.run import check_ranks, memory_of_run, sharing_of
from lightrft.planning.sizes import build_without_memory
from lightrft.strategy import background_saves, get_strategy
from lightrft.strategy.protocols.collectives import World
from lightrft.testing.ranks.here import run_here
from lightrft.testing.ranks.processes import processes
from lightrft.testing.ranks.spawn import SpawnRank
from lightrft.testing.subject import RunOnRanks, subject_of

FSDP2 = StrategyConfig(strategy="fsdp2", seed=5)


@pytest.fixture(scope="module")
def programs() -> Iterator[ModuleType]:
    folder = str(Path(__file__).parent)
    sys.path.insert(0, folder)  # workers get this path
    yield importlib.import_module("memory_programs")
    sys.path.remove(folder)


@pytest.fixture(scope="module")
def run_on_two(programs: ModuleType, spawn: SpawnRank) -> Iterator[RunOnRanks]:
    del programs
    with processes(subject_of("fsdp2", "strategy", config=FSDP2), 2, timeout=60, spawn=spawn) as run:
        yield run


@pytest.fixture(params=["single", "fsdp2", "fsdp2 on two"])
def ranks(request: pytest.FixtureRequest) -> tuple[str, int, RunOnRanks]:
    key, _, on_two = request.param.partition(" ")
    if on_two:
        return key, 2, request.getfixturevalue("run_on_two")
    return key, 1, run_here(subject_of(key, "strategy", config=attrs.evolve(FSDP2, strategy=key)))


def estimate(
    config: Config, *, world_size: int = 1, prompt_tokens: int = 3, prepare: Callable[..., None]
) -> dict[str, int]:
    model, _ = build_without_memory(config.model)
    prepare(model)
    lines = memory_of_run(config, model, world_size=world_size, on_cpu=True, prompt_tokens=prompt_tokens)
    assert len({line.name for line in lines}) == len(lines)
    return {line.name: line.num_bytes for line in lines}


@pytest.mark.parametrize("frozen", [(), ("embed_tokens", "layers.0.mlp", "norm")])
@pytest.mark.parametrize("is_tied", [True, False])
def test_parameters_gradients_and_state_are_exact(
    programs: ModuleType, ranks: tuple[str, int, RunOnRanks], frozen: tuple[str, ...], is_tied: bool
) -> None:
    """Rank 0 holds as many bytes as are estimated, to the last one, and no rank holds more."""
    key, world_size, run = ranks
    model = attrs.evolve(programs.MODEL, tie_embeddings=is_tied)
    strategy = attrs.evolve(FSDP2, strategy=key, train_batch_size=2 * world_size)
    found = run(programs.held, programs.Case(frozen=frozen, is_tied=is_tied))
    estimated = estimate(
        Config(strategy=strategy, model=model),
        world_size=world_size,
        prepare=lambda plain: programs.freeze(plain, frozen),
    )
    names = ("parameters", "gradients", "optimizer state")
    wanted = programs.Held(
        **dict(zip(("parameters", "gradients", "optimizer"), map(estimated.get, names), strict=True))
    )
    assert found[0] == wanted
    assert all(one.parameters <= wanted.parameters and one.optimizer <= wanted.optimizer for one in found)
    assert estimated["optimizer state"] > 2 * estimated["gradients"] > 0


@pytest.mark.parametrize(
    ("key", "architecture", "bf16"),
    [("single", "qwen3", False), ("single", "llama", False), ("single", "qwen3", True), ("fsdp2", "llama", True)],
)
def test_a_measured_step_is_near_the_estimate(key: str, architecture: str, bf16: bool) -> None:
    """Activations of a real step are within 3 % of the formula, and all tensors that are counted are exact."""
    config = Config(
        strategy=StrategyConfig(strategy=key, bf16=bf16, micro_train_batch_size=2, train_batch_size=8),
        model=ModelConfig(
            architecture=architecture, hidden_size=64, num_heads=4, num_key_value_heads=2, intermediate_size=160
        ),
        engine=EngineConfig(max_new_tokens=9),
        algorithm=AlgorithmConfig(kl_coef=0.1),
    )
    measured = measure_step(config, prompt_tokens=8)
    estimated = estimate(config, prompt_tokens=8, prepare=lambda plain: plain)
    for name in ("parameters", "gradients", "optimizer state", "reference model"):
        assert measured[name] == estimated[name]
    assert measured["activations"] == pytest.approx(estimated["activations"], rel=0.03)
    assert measured.get("bfloat16 copies") == estimated.get("bfloat16 copies")
    assert (key == "single" and bf16) == ("bfloat16 copies" in measured)


def test_a_layer_that_is_computed_again_is_measured_on_its_line() -> None:
    """With gradient checkpointing the measure stands beside the line that counts."""
    strategy = StrategyConfig(strategy="fsdp2", gradient_checkpointing=True)
    config = Config(strategy=strategy, model=ModelConfig(hidden_size=16), engine=EngineConfig(max_new_tokens=2))
    measured = measure_step(config, prompt_tokens=2)
    assert "activations" not in measured
    assert measured["activations, recomputed"] > 0


def test_a_save_in_the_background_copies_as_much_as_is_estimated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a real save of actor and reference copies has the bytes of the estimate, to the last one."""
    config = Config(
        strategy=StrategyConfig(strategy="single", train_batch_size=1),
        model=ModelConfig(hidden_size=16),
        algorithm=AlgorithmConfig(kl_coef=0.1),
        checkpoint=CheckpointConfig(save_in_background=True),
    )
    copied: list[int] = []

    def counted(content: CheckpointContent, world: World) -> Snapshot:
        snapshot = snapshot_of(content, world)

        def copy() -> None:
            snapshot.copy()
            ranges = [each for turn in snapshot.content.agreed.turns if isinstance(turn, Sequence) for each in turn]
            copied.append(local_bytes({each.tensor: each.tensor.part().values for each in ranges}.values()))

        return attrs.evolve(snapshot, copy=copy)

    monkeypatch.setattr("lightrft.backends.checkpointing.saving.snapshot_of", counted)
    strategy = get_strategy(config)
    strategy.setup_distributed()
    model, _ = build_model_and_tokenizer(config.model, seed=0)
    reference = strategy.prepare_reward_model(deepcopy(model))
    actor, _, _, _ = strategy.prepare_models_and_optimizers(model, None, None, None, None, 2)
    strategy.backward(actor.model(input_ids=torch.tensor([[1, 2]])).logits.sum(), actor.model, actor.optimizer)
    strategy.optimizer_step(actor.optimizer, actor.model, actor.scheduler)
    with background_saves(strategy) as background:
        strategy.save_ckpt({"actor": actor, "reference": reference}, tmp_path, background=background)
    lines = memory_of_run(config, model, world_size=1, on_cpu=False, prompt_tokens=3)
    line = next(line for line in lines if line.name == "copy to be saved")
    assert (copied, line.place) == ([line.num_bytes], "host")
    without = attrs.evolve(config, checkpoint=CheckpointConfig())
    assert line.name not in estimate(without, prepare=lambda plain: plain)


@pytest.fixture(scope="module")
def zero_on_two(programs: ModuleType, spawn: SpawnRank) -> Iterator[RunOnRanks]:
    del programs
    with processes(
        subject_of("deepspeed", "strategy", config=StrategyConfig(seed=5)), 2, timeout=60, spawn=spawn
    ) as run:
        yield run


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_what_zero_spreads_over_two_ranks(programs: ModuleType, zero_on_two: RunOnRanks, stage: int) -> None:
    """Parameters, state, stepped copy and the gradients of stage 3 are those of the formula, but for padding."""
    found, _ = zero_on_two(programs.held_by_zero, programs.Case(zero_stage=stage, frozen=("embed_tokens",)))
    config = Config(strategy=zero(zero_stage=stage), model=programs.MODEL)
    estimated = estimate(config, world_size=2, prepare=lambda plain: programs.freeze(plain, ("embed_tokens",)))
    padding = 4 * 8  # bytes of some numbers, in each of which a part is filled up
    assert found.parameters == estimated["parameters"]
    assert found.optimizer == pytest.approx(estimated["optimizer state"], abs=2 * padding + 4 * 40)
    assert found.stepped_copy == pytest.approx(estimated.get("stepped copy", 0), abs=padding)
    assert found.gradient_buffer == pytest.approx(estimated["gradients"] if stage == 3 else 0, abs=padding)


def zero(**changes: object) -> StrategyConfig:
    return StrategyConfig(**{"strategy": "deepspeed", "train_batch_size": 8, **changes})


@pytest.mark.parametrize(
    ("stage", "spread", "has_copy", "gathered"),
    [
        (0, (1, 1, 1), False, "none"),
        (1, (1, 1, 8), True, "none"),
        (2, (1, 8, 8), True, "none"),
        (3, (8, 8, 8), False, "all"),
    ],
)
def test_stages_of_zero_spread_one_thing_more_each(
    stage: int, spread: tuple[int, int, int], has_copy: bool, gathered: str
) -> None:
    """Optimizer state from stage 1, gradients from stage 2, parameters in stage 3, which needs no copy to step."""
    sharing = sharing_of(zero(zero_stage=stage), world_size=8, on_cpu=False)
    assert (sharing.parameter_ranks, sharing.gradient_ranks, sharing.optimizer_ranks) == spread
    assert (sharing.has_copy, sharing.gathered, sharing.offloaded) == (has_copy, gathered, frozenset())
    assert sharing.num_buckets == (2 if stage > 1 else 1)


def test_offloading_leaves_the_device_where_there_is_one() -> None:
    """What settings offload lies in main memory on CUDA, and where it was on a CPU."""
    both = zero(zero_stage=3, zero_offload_optimizer=True, zero_offload_param=True)
    sharing = sharing_of(both, world_size=8, on_cpu=False)
    assert sharing.offloaded == {"parameters", "gradients", "optimizer state"}
    assert sharing.has_copy
    assert sharing_of(both, world_size=8, on_cpu=True).offloaded == frozenset()
    whole = zero(zero_stage=0, zero_offload_optimizer=True)
    assert sharing_of(whole, world_size=8, on_cpu=False).offloaded == frozenset()
    sharded = StrategyConfig(fsdp=True, fsdp_cpu_offload=True)
    assert sharing_of(sharded, world_size=8, on_cpu=False).offloaded == sharing.offloaded
    assert sharing_of(sharded, world_size=8, on_cpu=True).offloaded == frozenset()


def test_gradients_of_fsdp2_wait_whole_while_a_window_has_more() -> None:
    """With one micro-batch a window nothing waits; with more, each rank keeps all of its own."""
    config = StrategyConfig(fsdp=True, micro_train_batch_size=2, train_batch_size=16)
    assert not sharing_of(config, world_size=8, on_cpu=False).keeps_gradients_whole
    assert sharing_of(config, world_size=4, on_cpu=False).keeps_gradients_whole


def test_a_strategy_of_somebody_else_is_taken_to_share_nothing() -> None:
    """Nothing is known of it, so every rank is said to hold all."""
    sharing = sharing_of(StrategyConfig(strategy="gloo"), world_size=8, on_cpu=False)
    assert (sharing.parameter_ranks, sharing.gradient_ranks, sharing.optimizer_ranks) == (1, 1, 1)


@pytest.mark.parametrize(
    ("changes", "world_size", "words"),
    [
        ({}, 0, "world_size=0 is no number of ranks; use 1 or more."),
        ({"strategy": "single"}, 2, "world_size=2 is more than strategy='single' supports, which is one process"),
        ({"strategy": "fsdp2", "fsdp_replicate": 3}, 4, "fsdp_replicate=3 does not divide world_size(4)"),
        ({"strategy": "fdsp2"}, 2, "strategy='fdsp2' is not registered; did you mean 'fsdp2'? Known: "),
        (
            {"strategy": "deepspeed", "zero_stage": 3, "zero_hpz": 2},
            3,
            "zero_hpz=2 does not divide world_size(3); use one of its divisors.",
        ),
        (
            {"train_batch_size": 4},
            8,
            "train_batch_size=4 is not divisible by micro_train_batch_size(1) * world_size(8) = 8",
        ),
        ({"train_batch_size": 32}, 32, "algorithm.prompts_per_step=16 is not divisible by world_size(32)"),
    ],
)
def test_a_number_of_ranks_that_cannot_be_is_refused(changes: dict[str, object], world_size: int, words: str) -> None:
    """What would be refused at the start of the run is refused when it is planned."""
    config = Config(strategy=StrategyConfig(**{"train_batch_size": 16, **changes}))
    with pytest.raises(ConfigError) as refused:
        check_ranks(config, world_size)
    assert words in str(refused.value)


def test_what_is_said_of_a_run_is_said_of_what_it_uses() -> None:
    """Copies of shards that no stage makes are no reason to refuse; an engine that nobody knows is one."""
    unused = StrategyConfig(strategy="deepspeed", zero_stage=2, zero_hpz=2, train_batch_size=3)
    algorithm = AlgorithmConfig(prompts_per_step=3, num_samples=2)
    check_ranks(Config(strategy=unused, algorithm=algorithm), 3)
    with pytest.raises(ConfigError, match="engine_type='nope' is not registered; Known: "):
        check_ranks(Config(strategy=unused, algorithm=algorithm, engine=EngineConfig(type="nope")), 3)
