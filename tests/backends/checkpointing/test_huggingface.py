from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig, Qwen3Config, Qwen3ForCausalLM

from lightrft.backends.checkpointing.canonical import CheckpointFunctions
from lightrft.backends.checkpointing.huggingface import build_save_model
from lightrft.backends.checkpointing.live import build_live_access
from lightrft.backends.collectives.single import build_collectives
from lightrft.errors import CheckpointError
from lightrft.strategy.config import StrategyConfig


def tiny(*, tied: bool, seed: int = 0, dtype: torch.dtype = torch.float32) -> Qwen3ForCausalLM:
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=11,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
        tie_word_embeddings=tied,
    )
    return Qwen3ForCausalLM(config).to(dtype)


def equal(left: nn.Module, right: nn.Module) -> bool:
    mine, theirs = left.state_dict(), right.state_dict()
    return mine.keys() == theirs.keys() and all(
        mine[name].dtype == theirs[name].dtype and torch.equal(mine[name], theirs[name]) for name in mine
    )


class Tokenizer:
    def save_pretrained(self, save_directory: str, /) -> None:
        Path(save_directory, "tokenizer.json").write_text("{}")


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transformers_reads_what_is_saved(
    tmp_path: Path, checkpointing: CheckpointFunctions, tied: bool, dtype: torch.dtype
) -> None:
    """from_pretrained loads every bit and misses no name; the files are those of transformers; the live model stays."""
    model = tiny(tied=tied, dtype=dtype)
    model.generation_config = GenerationConfig(temperature=0.5, do_sample=True)
    before = model.config.to_json_string()
    path = checkpointing.save_model(model, tmp_path / "a" / "out", tokenizer=Tokenizer())
    assert path == tmp_path / "a" / "out"
    assert model.config.to_json_string() == before
    assert sorted(file.name for file in path.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    loaded, report = AutoModelForCausalLM.from_pretrained(path, dtype="auto", output_loading_info=True)
    assert type(loaded) is Qwen3ForCausalLM
    assert equal(model, loaded)
    assert not any(report.values())
    assert loaded.generation_config.temperature == 0.5
    model.save_pretrained(tmp_path / "theirs")
    theirs = load_file(tmp_path / "theirs" / "model.safetensors")
    with safe_open(path / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert theirs.keys() == load_file(path / "model.safetensors").keys()
    config = json.loads((tmp_path / "theirs" / "config.json").read_text())
    assert json.loads((path / "config.json").read_text()) == config


@pytest.mark.parametrize("tied", [True, False])
def test_load_model_reads_our_files_and_those_of_transformers(
    tmp_path: Path, checkpointing: CheckpointFunctions, tied: bool
) -> None:
    """Weights come back bit for bit from our export, from transformers' one file, and from its shards with an index."""
    model = tiny(tied=tied)
    checkpointing.save_model(model, tmp_path / "ours")
    model.save_pretrained(tmp_path / "theirs")
    model.save_pretrained(tmp_path / "shards", max_shard_size=600)
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    for name in ("ours", "theirs", "shards"):
        other = tiny(tied=tied, seed=1)
        assert not equal(model, other)
        checkpointing.load_model(other, tmp_path / name)
        assert equal(model, other)
        assert (other.lm_head.weight is other.model.embed_tokens.weight) == tied


def test_plain_modules_are_saved_as_weights_alone(tmp_path: Path, checkpointing: CheckpointFunctions) -> None:
    """A module without a config gives one safetensors file, also through a link to an empty directory."""
    model = nn.Linear(2, 3)
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    checkpointing.save_model(model, tmp_path / "link")
    assert [file.name for file in (tmp_path / "empty").iterdir()] == ["model.safetensors"]
    other = nn.Linear(2, 3)
    checkpointing.load_model(other, tmp_path / "empty")
    assert equal(model, other)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["empty", "link"]


class Tied(nn.Module):
    """Ties against the order of its modules, and says as transformers does which name is filled."""

    def __init__(self) -> None:
        super().__init__()
        self.all_tied_weights_keys = {"first.weight": "second.weight"}
        self.first, self.second, self.third = (nn.Linear(2, 2, bias=False) for _ in range(3))
        self.first.weight = self.third.weight = self.second.weight


def test_tied_tensors_are_saved_under_the_name_that_is_looked_for(
    tmp_path: Path, checkpointing: CheckpointFunctions
) -> None:
    """Of tied names the one is written that the model does not fill itself; loading accepts any, unless they differ."""
    model, other = Tied(), Tied()
    checkpointing.save_model(model, tmp_path / "out")
    weight = model.second.weight.detach()
    assert list(load_file(tmp_path / "out" / "model.safetensors")) == ["second.weight"]
    checkpointing.load_model(other, tmp_path / "out")
    assert torch.equal(other.first.weight, weight)
    save_file({"first.weight": weight.clone(), "second.weight": weight.clone()}, tmp_path / "out" / "model.safetensors")
    checkpointing.load_model(other, tmp_path / "out")
    save_file({"first.weight": weight + 1, "second.weight": weight.clone()}, tmp_path / "out" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"second.weight and first.weight differ, and the model ties them"):
        checkpointing.load_model(other, tmp_path / "out")
    assert torch.equal(other.first.weight, weight)


def test_nothing_is_overwritten(tmp_path: Path, checkpointing: CheckpointFunctions) -> None:
    """A directory with files, and a file, are refused and stay; the leftover of a killed export goes."""
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    (tmp_path / "file").touch()
    for name in ("full", "file"):
        with pytest.raises(CheckpointError, match=rf"output_dir='.*/{name}' is not an empty directory"):
            checkpointing.save_model(nn.Linear(1, 1), tmp_path / name)
    (tmp_path / ".out.tmp-0123456789abcdef").mkdir()
    (tmp_path / ".other.tmp-0123456789abcdef").mkdir()
    checkpointing.save_model(nn.Linear(1, 1), tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".other.tmp-0123456789abcdef", "file", "full", "out"]


def test_a_failing_export_leaves_nothing(tmp_path: Path, checkpointing: CheckpointFunctions) -> None:
    """When the tokenizer fails, its error comes through and no directory stays."""

    class Failing:
        def save_pretrained(self, save_directory: str, /) -> None:
            raise KeyError(save_directory)

    with pytest.raises(KeyError):
        checkpointing.save_model(nn.Linear(1, 1), tmp_path / "out", tokenizer=Failing())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("index", "reason"),
    [
        ('{"weight_map": {"weight": "../model.safetensors"}}', "outside of its directory"),
        ('{"weight_map": {"weight": "none.safetensors"}}', r"index\.json names none\.safetensors, which is not there"),
        (
            '{"weight_map": {"weight": "model.safetensors", "weight": "model.safetensors"}}',
            r"index\.json is not JSON \('weight' stands twice",
        ),
        ('{"weight_map": {"weight": "model.safetensors"}}', "has what the live state lacks: bias in the index"),
        ('{"weight_map": 3}', r"model\.safetensors\.index\.json holds .*where an object belongs"),
        ("3", r"model\.safetensors\.index\.json holds .*where an object belongs"),
        ("{", r"model\.safetensors\.index\.json is not JSON"),
    ],
)
def test_damaged_indices_are_refused(
    tmp_path: Path, checkpointing: CheckpointFunctions, index: str, reason: str
) -> None:
    """An index that is damaged, leaves the directory or disagrees with its files is refused, and nothing is changed."""
    checkpointing.save_model(nn.Linear(2, 2), tmp_path / "out")
    (tmp_path / "out" / "model.safetensors.index.json").write_text(index)
    model = nn.Linear(2, 2)
    before = model.weight.detach().clone()
    with pytest.raises(CheckpointError, match=reason):
        checkpointing.load_model(model, tmp_path / "out")
    assert torch.equal(model.weight, before)


def save_in_files(model: nn.Module, directory: Path, max_file_size: int) -> None:
    """Save with files of at most so many bytes of tensors."""
    collectives = build_collectives(StrategyConfig(strategy="single"))
    build_save_model(collectives, build_live_access(lambda module: module), max_file_size=max_file_size)(
        model, directory
    )


@pytest.mark.parametrize(("tied", "max_file_size"), [(True, 1100), (False, 1300)])
def test_large_models_are_saved_in_files_with_an_index(
    tmp_path: Path, checkpointing: CheckpointFunctions, tied: bool, max_file_size: int
) -> None:
    """Files fill up to the bound, in the order of modules; transformers reads them, and so do we, bit for bit."""
    model, other = tiny(tied=tied), tiny(tied=tied, seed=1)
    out = tmp_path / "out"
    save_in_files(model, out, max_file_size)
    files = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
    assert sorted(file.name for file in out.glob("model*")) == [*files, "model.safetensors.index.json"]
    parts = [load_file(out / file) for file in files]
    sizes = [sum(tensor.nbytes for tensor in part.values()) for part in parts]
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": sum(sizes)}
    assert index["weight_map"] == {name: file for file, part in zip(files, parts, strict=True) for name in part}
    assert max(sizes) <= max_file_size
    written = list(index["weight_map"])
    assert written == [name for name in model.state_dict() if name in written]
    for size, later in itertools.pairwise(parts):
        first = next(name for name in written if name in later)
        assert sum(tensor.nbytes for tensor in size.values()) + later[first].nbytes > max_file_size
    loaded, report = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert equal(model, loaded)
    assert not any(report.values())
    checkpointing.load_model(other, out)
    assert equal(model, other)


def test_a_tensor_larger_than_a_file_has_one_of_its_own(tmp_path: Path, checkpointing: CheckpointFunctions) -> None:
    """The bound never refuses a tensor, and what fits exactly needs no index."""
    model, other = nn.Linear(4, 5), nn.Linear(4, 5)
    save_in_files(model, tmp_path / "two", 99)
    assert [len(load_file(file)) for file in sorted((tmp_path / "two").glob("*.safetensors"))] == [1, 1]
    checkpointing.load_model(other, tmp_path / "two")
    assert equal(model, other)
    save_in_files(model, tmp_path / "one", 100)
    assert [file.name for file in (tmp_path / "one").iterdir()] == ["model.safetensors"]


def damage(directory: Path, how: str) -> None:
    """Damage a directory of two files, `weight` in the first and `bias` in the second."""
    first, second = (directory / f"model-0000{number}-of-00002.safetensors" for number in (1, 2))
    index = directory / "model.safetensors.index.json"
    if how == "file missing":
        second.unlink()
    elif how == "file cut":
        second.write_bytes(second.read_bytes()[:-1])
    elif how == "exchanged":
        first.rename(directory / "kept")
        second.rename(first)
        (directory / "kept").rename(second)
    elif how == "tensor twice":
        save_file({**load_file(first), **load_file(second)}, second)
    elif how == "not in the index":
        save_file({"more": torch.zeros(1), **load_file(second)}, second)
    elif how == "in no file":
        save_file({"other": torch.zeros(1)}, second)
    elif how == "two sets":
        save_file({**load_file(first), **load_file(second)}, directory / "model.safetensors")
    else:
        index.unlink()


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("file missing", r"index\.json names model-00002-of-00002\.safetensors, which is not there"),
        ("file cut", r"model-00002-of-00002\.safetensors is not a whole safetensors file"),
        ("exchanged", r"has weight in model-00001-of-00002\.safetensors, and it stands in model-00002-of-00002"),
        ("tensor twice", r"weight stands in model-00001-of-00002\.safetensors and in model-00002-of-00002"),
        ("not in the index", r"has what the live state lacks: more in the index"),
        ("in no file", r"lacks bias and has what the live state lacks: other in the index"),
        ("two sets", r"holds model\.safetensors beside an index that does not name it"),
        ("index missing", r"model\.safetensors is not a whole safetensors file"),
    ],
)
def test_damaged_sets_of_files_are_refused(
    tmp_path: Path, checkpointing: CheckpointFunctions, how: str, reason: str
) -> None:
    """Files that are missing, cut, exchanged or disagree with the index are refused by name, and nothing is changed."""
    save_in_files(nn.Linear(2, 2), tmp_path, 16)
    model, before = nn.Linear(2, 2), nn.Linear(2, 2)
    before.load_state_dict(model.state_dict())
    damage(tmp_path, how)
    with pytest.raises(CheckpointError, match=reason):
        checkpointing.load_model(model, tmp_path)
    assert equal(model, before)


def test_weights_that_do_not_fit_are_refused_whole(tmp_path: Path, checkpointing: CheckpointFunctions) -> None:
    """Other names, shapes or dtypes, a truncated file and a missing directory are refused, and nothing is changed."""
    checkpointing.save_model(nn.Linear(2, 2), tmp_path / "out")
    for model, reason in (
        (nn.Linear(2, 3), r"differs in weight \(float32\[2, 2\] there, float32\[3, 2\] here\)"),
        (nn.Linear(2, 2).bfloat16(), r"float32\[2, 2\] there, bfloat16\[2, 2\] here"),
        (nn.Linear(2, 2, bias=False), "has what the live state lacks: bias"),
        (nn.Sequential(nn.Linear(2, 2)), "lacks 0.weight, 0.bias and has what the live state lacks"),
    ):
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with pytest.raises(CheckpointError, match=reason):
            checkpointing.load_model(model, tmp_path / "out")
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    file = tmp_path / "out" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    for directory in (tmp_path / "out", tmp_path / "none"):
        with pytest.raises(CheckpointError, match=r"model.safetensors is not a whole safetensors file"):
            checkpointing.load_model(nn.Linear(2, 2), directory)
