"""`lightrft checkpoint import` of Hugging Face directories, of raw DCP, and of what is none of them."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from cli_runs import Cli
from torch import nn
from torch.distributed.checkpoint.metadata import MetadataIndex
from transformers import LlamaConfig, LlamaForCausalLM

from lightrft.errors import CheckpointError
from lightrft.strategy import StrategyConfig, get_strategy

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is")


def llama(*, seed: int, ties: bool = False, num_layers: int = 2) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=23,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=num_layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        tie_word_embeddings=ties,
    )
    return LlamaForCausalLM(config)


def same_weights(left: nn.Module, right: nn.Module) -> bool:
    tables = left.state_dict(), right.state_dict()
    return tables[0].keys() == tables[1].keys() and all(
        torch.equal(tables[0][key], tables[1][key]) for key in tables[0]
    )


def load(model: nn.Module, directory: str) -> nn.Module:
    strategy = get_strategy(StrategyConfig(strategy="single"))
    strategy.setup_distributed()
    strategy.load_ckpt({"actor": model}, directory)
    return model


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("max_shard_size", ["1GB", "10KB"])
def test_a_hugging_face_directory_becomes_a_checkpoint(cli: Cli, *, ties: bool, max_shard_size: str) -> None:
    """One file or several, tied weights or none: `load_ckpt` and `export` give the same bits back."""
    saved = llama(seed=1, ties=ties)
    saved.save_pretrained("source", max_shard_size=max_shard_size)
    assert (len([*Path("source").glob("*.safetensors")]) > 1) == (max_shard_size == "10KB")
    outcome = cli("checkpoint", "import", "source", "target", "--step", "5")
    assert (outcome.code, outcome.err) == (0, ""), outcome
    num_tensors = len(dict(saved.named_parameters()))
    lines = outcome.out.splitlines()
    assert lines[0].startswith(f"wrote target/step-00000005: actor of huggingface, {num_tensors} tensors, ")
    assert lines[1:] == [
        "missing: the optimizer.",
        "missing: the schedule, the random streams and the client state, which are not read from other programs.",
    ]
    assert same_weights(load(llama(seed=2, ties=ties), "target"), saved)
    assert cli("checkpoint", "verify", "target").code == 0
    assert cli("checkpoint", "export", "target", "out").code == 0
    strategy = get_strategy(StrategyConfig(strategy="single"))
    other = llama(seed=3, ties=ties)
    strategy.load_model(other, "out")
    assert same_weights(other, saved)


def test_dtypes_stay(cli: Cli) -> None:
    """Weights in bfloat16 are bfloat16 in the checkpoint."""
    saved = llama(seed=1).bfloat16()
    saved.save_pretrained("source")
    assert cli("checkpoint", "import", "source", "target").code == 0
    loaded = load(llama(seed=2).bfloat16(), "target")
    assert same_weights(loaded, saved)
    assert next(loaded.parameters()).dtype == torch.bfloat16


def test_a_model_without_configuration_is_imported_without_its_ties(cli: Cli) -> None:
    """Its weights are there, and that nothing is known of ties is said; another directory tells them."""
    llama(seed=1, ties=True).save_pretrained("source")
    Path("source/config.json").rename("config.json")
    outcome = cli("checkpoint", "import", "source", "target")
    assert "missing: which weights are tied. path='source' holds no config.json" in outcome.out
    with pytest.raises(CheckpointError, match="tied names"):
        load(llama(seed=2, ties=True), "target")
    assert cli("checkpoint", "import", "source", "other", "--like", ".").code == 0
    assert same_weights(load(llama(seed=2, ties=True), "other"), llama(seed=1, ties=True))


def test_a_dry_run_writes_nothing_and_says_the_same(cli: Cli, here: Path) -> None:
    """Its JSON differs in that alone."""
    llama(seed=1).save_pretrained("source")
    before = sorted(here.rglob("*"))
    dry = json.loads(cli("checkpoint", "import", "source", "target", "--dry-run", "--json").out)
    assert sorted(here.rglob("*")) == before
    real = json.loads(cli("checkpoint", "import", "source", "target", "--json").out)
    assert dry == {**real, "is_dry_run": True}
    assert real["path"] == "target/step-00000000"
    assert real["model"]["actor"]["optimizer"] is None
    assert real["num_bytes"] == sum(4 * tensor.numel() for tensor in llama(seed=1).parameters())


def test_a_raw_directory_of_dcp_becomes_a_checkpoint(cli: Cli) -> None:
    """Under each of its names stands a tied tensor there; `--like` says that it is one."""
    saved = llama(seed=1, ties=True)
    dcp.save({"model": saved.state_dict(), "epoch": 2}, checkpoint_id="source", no_dist=True)
    llama(seed=2, ties=True).save_pretrained("base")
    outcome = cli("checkpoint", "import", "source", "run/checkpoints", "--like", "base")
    assert outcome.code == 0, outcome
    assert "left out: epoch, no tensor." in outcome.out
    assert same_weights(load(llama(seed=3, ties=True), "run/checkpoints"), saved)
    outcome = cli("checkpoint", "import", "source", "run", "--like", "base", "--step", "3", "--model", "policy")
    assert outcome.out.startswith("wrote run/checkpoints/step-00000003: policy of torch-dcp")


def test_into_a_step_that_is_there_nothing_is_written(cli: Cli) -> None:
    """What stands there stays."""
    llama(seed=1).save_pretrained("source")
    llama(seed=2).save_pretrained("other")
    assert cli("checkpoint", "import", "source", "target").code == 0
    for option in ((), ("--dry-run",)):
        outcome = cli("checkpoint", "import", "other", "target", *option)
        assert outcome.code == 1
        assert "step=0 exists already" in outcome.line
    assert same_weights(load(llama(seed=3), "target"), llama(seed=1))


def nothing() -> None:
    Path("source").mkdir()


def a_file() -> None:
    Path("source").touch()


def checkpoint_of_ours() -> None:
    strategy = get_strategy(StrategyConfig(strategy="single"))
    strategy.setup_distributed()
    strategy.save_ckpt(nn.Linear(1, 1), "ours", step=1).rename("source")


def adapters() -> None:
    nothing()
    Path("source/adapter_model.safetensors").touch()


def pickled_weights() -> None:
    nothing()
    torch.save({}, "source/pytorch_model.bin")


def half_a_model() -> None:
    llama(seed=1).save_pretrained("source", max_shard_size="10KB")
    next(Path("source").glob("model-00001-*")).unlink()


def damaged_weights() -> None:
    llama(seed=1).save_pretrained("source")
    path = Path("source/model.safetensors")
    path.write_bytes(path.read_bytes()[:-1])


def save_dcp() -> None:
    dcp.save({"model": {"w": torch.ones(3)}, "other": {"w": torch.ones(2)}}, checkpoint_id="source", no_dist=True)


def without_part() -> None:
    save_dcp()
    next(Path("source").glob("*.distcp")).unlink()


def with_short_part() -> None:
    save_dcp()
    path = next(Path("source").glob("*.distcp"))
    path.write_bytes(path.read_bytes()[:-1])


def with_damaged_part() -> None:
    save_dcp()
    path = next(Path("source").glob("*.distcp"))
    path.write_bytes(bytes(path.stat().st_size))


def empty_metadata() -> None:
    nothing()
    Path("source/.metadata").touch()


def two_models() -> None:
    dcp.save({name: {"w": torch.ones(3)} for name in ("a", "b")}, checkpoint_id="source", no_dist=True)


def no_model() -> None:
    dcp.save({"epoch": 3}, checkpoint_id="source", no_dist=True)


def elsewhere() -> None:
    nothing()
    Path("source/latest").write_text("../..\n")


def edited(change: Callable[[Any], None]) -> Callable[[], None]:
    """A directory of DCP whose `.metadata` says something else."""

    def make() -> None:
        save_dcp()
        path = Path("source/.metadata")
        metadata = pickle.loads(path.read_bytes())  # noqa: S301 (ours)
        change(metadata)
        path.write_bytes(pickle.dumps(metadata))

    make.__name__ = change.__name__
    return make


def tensor_of(metadata: Any) -> Any:
    return metadata.state_dict_metadata["model.w"]


def place_of(metadata: Any) -> Any:
    return next(place for index, place in metadata.storage_data.items() if index.fqn == "model.w")


def huge_shape(metadata: Any) -> None:
    tensor_of(metadata).size = torch.Size([2**60])


def huge_part(metadata: Any) -> None:
    tensor_of(metadata).size = tensor_of(metadata).chunks[0].sizes = torch.Size([2**60])


def parts_over_one_another(metadata: Any) -> None:
    tensor_of(metadata).size = torch.Size([6])
    tensor_of(metadata).chunks *= 2


def part_outside(metadata: Any) -> None:
    index = next(index for index in metadata.storage_data if index.fqn == "model.w")
    place = metadata.storage_data.pop(index)
    tensor_of(metadata).chunks[0].offsets = torch.Size([2])
    metadata.storage_data[MetadataIndex("model.w", torch.Size([2]))] = place


def other_dtype(metadata: Any) -> None:
    tensor_of(metadata).properties.dtype = torch.int32


def dtype_of_no_kind(metadata: Any) -> None:
    tensor_of(metadata).properties.dtype = "float32"


def file_outside(metadata: Any) -> None:
    place_of(metadata).relative_path = "../secret"


def place_before_the_file(metadata: Any) -> None:
    place_of(metadata).offset = -5


def extension(metadata: Any) -> None:
    place_of(metadata).transform_descriptors = ["zstd"]


def nowhere(metadata: Any) -> None:
    metadata.storage_data.clear()


def with_reserved_name() -> None:
    dcp.save({"model": {"__metadata__": torch.ones(3)}}, checkpoint_id="source", no_dist=True)


def with_number_for_name() -> None:
    nothing()
    module = {"dp_world_size": 1, "module": {3: torch.ones(2)}, "global_steps": 1}
    torch.save(module, "source/mp_rank_00_model_states.pt")


def sparse() -> None:
    nothing()
    module = {"w": torch.ones(2).to_sparse()}
    torch.save({"dp_world_size": 1, "module": module, "global_steps": 1}, "source/mp_rank_00_model_states.pt")


def split_by_tensors() -> None:
    nothing()
    for rank in range(2):
        torch.save({"module": {}}, f"source/mp_rank_0{rank}_model_states.pt")


def without_model_file() -> None:
    nothing()
    torch.save({}, "source/zero_pp_rank_0_mp_rank_00_optim_states.pt")


def without_rank() -> None:
    nothing()
    torch.save({"dp_world_size": 2, "module": {}}, "source/mp_rank_00_model_states.pt")
    torch.save({}, "source/zero_pp_rank_1_mp_rank_00_optim_states.pt")


def without_last_rank() -> None:
    nothing()
    torch.save({"dp_world_size": 2, "module": {}}, "source/mp_rank_00_model_states.pt")
    torch.save({}, "source/zero_pp_rank_0_mp_rank_00_optim_states.pt")


def of_another_form() -> None:
    nothing()
    torch.save({"module": 3, "global_steps": "many"}, "source/mp_rank_00_model_states.pt")


@pytest.mark.parametrize(
    ("make", "options", "code", "words"),
    [
        (None, [], 2, "SOURCE='source' is not a directory"),
        (a_file, [], 2, "SOURCE='source' is not a directory"),
        (nothing, [], 2, "SOURCE='source' is no checkpoint that is known (it holds no model.safetensors, "),
        (checkpoint_of_ours, [], 2, "SOURCE='source' is a checkpoint of lightrft already"),
        (adapters, [], 2, "SOURCE='source' holds adapters alone"),
        (pickled_weights, [], 2, "SOURCE='source' holds its weights in a pickle"),
        (half_a_model, [], 1, "names model-00001-of-"),
        (damaged_weights, [], 1, "source/model.safetensors is not a whole safetensors file"),
        (without_part, [], 1, "names __0_0.distcp, which is not there"),
        (with_short_part, [], 1, "source/__0_0.distcp is cut off"),
        (with_damaged_part, [], 1, "source: model.w is refused by torch's restricted unpickler"),
        (empty_metadata, [], 1, "source/.metadata is no pickle that can be read safely (it is cut off)"),
        (two_models, [], 2, "--model='actor' is not in source, which holds a, b"),
        (no_model, [], 1, "source holds no tensors of a model"),
        (elsewhere, [], 1, "source/latest names '../..', which is no directory beside it"),
        (edited(huge_shape), [], 1, "source: model.w has not the elements of its shape"),
        (edited(huge_part), [], 1, "source: model.w has not the elements of its shape"),
        (edited(parts_over_one_another), [], 1, "source: model.w lacks some of its elements"),
        (edited(part_outside), [], 1, "source: model.w has a part outside of its shape [3]"),
        (edited(other_dtype), [], 1, "source: model.w has a part that is not what .metadata says"),
        (edited(dtype_of_no_kind), [], 1, "(TypeError(\"model.w has the dtype 'float32'\"))"),
        (edited(file_outside), [], 1, "names the file '../secret' outside of its directory; do not trust its source"),
        (edited(place_before_the_file), [], 1, "lies at -5"),
        (edited(extension), [], 1, "was written through an extension"),
        (edited(nowhere), [], 1, "source has not the form of a checkpoint that is known (KeyError("),
        (with_reserved_name, [], 1, "source has a tensor of the name '__metadata__'"),
        (with_number_for_name, [], 1, "source has a tensor of the name 3"),
        (sparse, [], 2, "source: w is sparse or quantized"),
        (split_by_tensors, [], 2, "source/mp_rank_01_model_states.pt is of a model that was split by tensors"),
        (without_model_file, [], 1, "source lacks mp_rank_00_model_states.pt"),
        (without_rank, [], 1, "source lacks a file of rank 0"),
        (without_last_rank, [], 1, "source has files of 1 ranks, and 2 wrote it"),
        (of_another_form, [], 1, "source has not the form of a checkpoint that is known (AttributeError("),
        (save_dcp, ["--step", "-1"], 2, "--step=-1 is no step"),
        (save_dcp, ["--model", "a b"], 2, "model='a b' is no name"),
        (save_dcp, ["--like", "nowhere"], 2, "path='nowhere' is not a directory"),
        (save_dcp, ["--max-num", "1"], 2, "--max-num says nothing to import"),
    ],
)
def test_a_wrong_source_is_one_line(
    cli: Cli, here: Path, make: Callable[[], None] | None, options: list[str], code: int, words: str
) -> None:
    """It says what is wrong, and nothing is written."""
    if make is not None:
        make()
    outcome = cli("checkpoint", "import", "source", "target", *options)
    assert words in outcome.line, outcome
    assert outcome.code == code, outcome
    assert not (here / "target").exists() or not any((here / "target").iterdir())


def test_another_model_is_refused(cli: Cli) -> None:
    """A directory that describes other shapes says nothing about the source."""
    dcp.save({"model": llama(seed=1).state_dict()}, checkpoint_id="source", no_dist=True)
    llama(seed=1, num_layers=1).save_pretrained("base")
    outcome = cli("checkpoint", "import", "source", "target", "--like", "base")
    assert outcome.code == 1
    assert "the checkpoint has what the live state lacks: model.layers.1." in outcome.line
