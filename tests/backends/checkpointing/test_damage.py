from __future__ import annotations

import hashlib
import json
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from lightrft.backends.checkpointing.canonical import CheckpointFunctions
from lightrft.errors import CheckpointError, ConfigError
from lightrft.strategy.protocols.training import Trainable

Make = Callable[..., Trainable]
Train = Callable[[Trainable, int], list[float]]
Snapshot = Callable[[Trainable], dict[str, object]]

FILES = [
    "client_state.json",
    "manifest.json",
    "model.model.safetensors",
    "model.optimizer.safetensors",
    "model.state.json",
    "rank-00000.model.gradients.safetensors",
    "rank-00000.random.json",
]


@pytest.fixture
def refused(
    saved: Path, checkpointing: CheckpointFunctions, make_trainable: Make, train: Train, snapshot: Snapshot
) -> Callable[[str], None]:
    """Checks that loading is refused, names the file, and leaves the live state as it was."""
    live = make_trainable(5)
    train(live, 3)
    before = snapshot(live)

    def check(pattern: str) -> None:
        with pytest.raises(CheckpointError, match=pattern) as caught:
            checkpointing.load_ckpt(live, saved)
        assert "\n" not in str(caught.value)
        assert snapshot(live) == before

    return check


def reseal(path: Path, change: Callable[[dict[str, object]], None]) -> None:
    """Change a manifest and give it a digest that fits, as somebody who forges it would."""
    content = json.loads(path.read_bytes())["content"]
    change(content)
    digest = hashlib.sha256((json.dumps(content) + "\n").encode()).hexdigest()
    path.write_text(json.dumps({"content": content, "sha256": digest}, indent=2) + "\n")


def replace(path: Path, content: bytes) -> None:
    """Change a file and its record in the manifest."""
    path.write_bytes(content)

    def change(manifest: dict[str, object]) -> None:
        record = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        manifest["files"][path.name] = record  # type: ignore[index]

    reseal(path.parent / "manifest.json", change)


def test_the_matrix_below_covers_every_file(saved: Path) -> None:
    """The list of files that are damaged is the list of files that there are."""
    assert sorted(path.name for path in (saved / "step-00000002").iterdir()) == FILES


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_is_refused(saved: Path, refused: Callable[[str], None], name: str) -> None:
    """One flipped bit at any of 30 random places of a file is refused, and the file and the older step are named."""
    path = saved / "step-00000002" / name
    content = path.read_bytes()
    places = random.Random(name)  # noqa: S311 (no secret)
    for _ in range(30):  # 210 places of the checkpoint
        damaged = bytearray(content)
        damaged[places.randrange(len(content))] ^= 1 << places.randrange(8)
        path.write_bytes(damaged)
        refused(rf"{re.escape(str(path))} .*step=1; pass that")


@pytest.mark.parametrize("name", FILES)
def test_truncated_removed_swapped_and_lengthened_files_are_refused(
    saved: Path, refused: Callable[[str], None], name: str
) -> None:
    """A file cut anywhere, emptied, lengthened, removed, replaced by a link or taken from another step is refused."""
    path, other = saved / "step-00000002" / name, saved / "step-00000001" / name
    content = path.read_bytes()
    pattern = re.escape(str(path))
    for damaged in (
        b"",
        content[:1],
        content[: len(content) // 3],
        content[: len(content) // 2],
        content[:-1],
        content + b"\n",
        other.read_bytes(),
    ):
        if damaged != content:
            path.write_bytes(damaged)
            refused(pattern)
    path.unlink()
    refused(pattern)
    path.symlink_to(other)
    refused(pattern)
    path.unlink()
    path.mkdir()
    refused(pattern)


def test_a_file_that_is_none_of_the_checkpoint_is_let_be(
    saved: Path, checkpointing: CheckpointFunctions, make_trainable: Make
) -> None:
    """What somebody left in the directory of a step, whatever its name, is neither read nor removed nor in the way."""
    path = saved / "step-00000002"
    names = ("notes.txt", "rank-00001.random.json", "other.model.safetensors", ".hidden")
    for name in names:
        (path / name).write_text("mine")
    assert checkpointing.load_ckpt(make_trainable(1), saved).client_state == {"seen": 5}
    assert [(path / name).read_text() for name in names] == ["mine"] * 4


def test_an_older_step_loads_beside_a_damaged_one(
    saved: Path, checkpointing: CheckpointFunctions, make_trainable: Make
) -> None:
    """A newest checkpoint without its manifest is refused and not passed over; the older one loads by its step."""
    (saved / "step-00000002" / "manifest.json").unlink()
    assert checkpointing.latest_ckpt(saved) == 2
    with pytest.raises(CheckpointError, match=r"step-00000002/manifest.json cannot be read: .*step=1; pass that"):
        checkpointing.load_ckpt(make_trainable(1), saved)
    assert checkpointing.load_ckpt(make_trainable(1), saved, step=1).client_state == {"seen": 3}


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("../step-00000001/client_state.json", "no checkpoint holds"),
        ("/etc/passwd", "no checkpoint holds"),
        ("..", "no checkpoint holds"),
        (".hidden", "no checkpoint holds"),
        ("a\\b", "no checkpoint holds"),
        ("manifest.json", "no checkpoint holds"),
        ("", "no checkpoint holds"),
    ],
)
def test_forged_names_are_refused(saved: Path, refused: Callable[[str], None], name: str, reason: str) -> None:
    """A manifest that names anything but a plain file of its own directory is refused, though its digest fits."""

    def change(content: dict[str, object]) -> None:
        content["files"][name] = {"size": 1, "sha256": ""}  # type: ignore[index]

    reseal(saved / "step-00000002" / "manifest.json", change)
    refused(reason)


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("format", "other", "is of the format 'other'"),
        ("version", 2, "format version 2"),
        ("step", 1, "is of step 1, not 2"),
        ("world_size", "1", "where a whole number belongs"),
        ("world_size", -1, "where a whole number belongs"),
        ("world_size", 2, "lacks rank-00001.random.json"),
        ("files", [], "where an object belongs"),
        ("files", {"a": 1}, "where an object belongs"),
    ],
)
def test_forged_manifests_are_refused(
    saved: Path, refused: Callable[[str], None], key: str, value: object, reason: str
) -> None:
    """A manifest of another form, format, version or step is refused with the reason, though its digest fits."""

    def change(content: dict[str, object]) -> None:
        content[key] = value

    reseal(saved / "step-00000002" / "manifest.json", change)
    refused(reason)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("client_state.json", b"[]", "client_state.json holds a list"),
        ("client_state.json", b"NaN", "NaN is not JSON"),
        ("client_state.json", b'{"a": {"$new": 1}}', "no form of a value"),
        ("client_state.json", b'{"a": {"$float": 1, "b": 2}}', "no form of a value"),
        ("client_state.json", b"[" * 100_000, "is not JSON"),
        ("rank-00000.random.json", b'{"python": 1, "torch": ""}', "no state of a random stream"),
        ("rank-00000.random.json", b"{}", "no state of a random stream"),
        ("model.state.json", b"{}", "where an object belongs"),
        ("model.state.json", b'{"aliases": {}, "optimizer": {}}', "tied names"),
        ("model.model.safetensors", b"\x00" * 20, "not a whole safetensors file"),
    ],
)
def test_forged_files_are_refused(
    saved: Path, refused: Callable[[str], None], name: str, content: bytes, reason: str
) -> None:
    """A file whose digest fits and whose content has not the form is refused with the reason, nothing half applied."""
    replace(saved / "step-00000002" / name, content)
    refused(reason)


def test_a_record_without_its_fields_is_refused(saved: Path, refused: Callable[[str], None]) -> None:
    """A forged optimizer record without its fields ends in one clear error."""
    path = saved / "step-00000002" / "model.state.json"
    record = json.loads(path.read_bytes())
    del record["optimizer"]["defaults"]
    replace(path, json.dumps(record).encode())
    refused("has not the form of a checkpoint")


def test_a_forged_number_that_no_stream_holds_is_refused(saved: Path, refused: Callable[[str], None]) -> None:
    """A number of numpy's stream that has more than 32 bits is one clear error, on which ranks can agree."""
    path = saved / "step-00000002" / "rank-00000.random.json"
    streams = json.loads(path.read_bytes())
    numbers = re.search(r"\[(\d+), ", json.dumps(streams["numpy"]))
    assert numbers is not None
    streams["numpy"] = json.loads(json.dumps(streams["numpy"]).replace(numbers[0], f"[{2**33}, ", 1))
    replace(path, json.dumps(streams).encode())
    refused("rank-00000.random.json holds no state of a random stream")


def other_shape(trainable: Trainable) -> Trainable:
    trainable.model.register_buffer("count", torch.zeros(2, dtype=torch.int64))
    return trainable


def other_dtype(trainable: Trainable) -> Trainable:
    trainable.model.register_buffer("count", torch.tensor(0, dtype=torch.int32))
    return trainable


def more_names(trainable: Trainable) -> Trainable:
    for index in range(7):
        trainable.model.register_buffer(f"extra{index}", torch.zeros(1))
    return trainable


def fewer_names(trainable: Trainable) -> Trainable:
    del trainable.model.flags
    return trainable


def untied(trainable: Trainable) -> Trainable:
    trainable.model.head = nn.Linear(4, 5, bias=False)
    return trainable


def not_expanded(trainable: Trainable) -> Trainable:
    trainable.model.register_buffer("flags", torch.zeros(1, dtype=torch.bool).expand(2))
    return trainable


def no_schedule(trainable: Trainable) -> Trainable:
    return Trainable(trainable.model, trainable.optimizer, None)


def other_schedule(trainable: Trainable) -> Trainable:
    return trainable._replace(scheduler=torch.optim.lr_scheduler.CosineAnnealingLR(trainable.optimizer, 3))


class RefusingSchedule(torch.optim.lr_scheduler.LambdaLR):
    def load_state_dict(self, state_dict: dict[str, object]) -> None:
        del state_dict
        raise IndexError("lambda")


def failing_schedule(trainable: Trainable) -> Trainable:
    return trainable._replace(scheduler=RefusingSchedule(trainable.optimizer, lambda step: 1 / (1 + step)))


def other_optimizer(trainable: Trainable) -> Trainable:
    return Trainable(trainable.model, torch.optim.SGD(trainable.model.parameters(), lr=0.1), None)


def one_group(trainable: Trainable) -> Trainable:
    parameters = [p for p in trainable.model.parameters() if p.requires_grad]
    return Trainable(trainable.model, torch.optim.AdamW(parameters), None)


def empty_group(trainable: Trainable) -> Trainable:
    trainable.optimizer.add_param_group({"params": []})
    return trainable


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (other_shape, r"model.model.safetensors .*differs in count \(int64\[\] there, int64\[2\] here\)"),
        (other_dtype, r"differs in count \(int64\[\] there, int32\[\] here\)"),
        (more_names, r"lacks extra0, extra1, extra2, extra3, extra4 and 2 more"),
        (fewer_names, r"has what the live state lacks: flags"),
        (untied, r"model.state.json \(tied names\) has what the live state lacks: head.weight"),
        (not_expanded, r"flags is an expanded tensor here"),
        (no_schedule, r"has a schedule and the call has none"),
        (other_schedule, r"\(the schedule\) lacks"),
        (failing_schedule, r"the schedule refuses \(IndexError\('lambda'\)\)"),
        (other_optimizer, r"amsgrad, .*which SGD lacks"),
        (one_group, r"\(optimizer parameters\) differs in .*\(group 1 there, group 0 here\)"),
        (empty_group, r"has 2 parameter groups, and the optimizer has 3"),
    ],
)
def test_what_does_not_fit_is_refused(
    saved: Path,
    checkpointing: CheckpointFunctions,
    make_trainable: Make,
    train: Train,
    snapshot: Snapshot,
    change: Callable[[Trainable], Trainable],
    reason: str,
) -> None:
    """Names, shapes, dtypes, ties, groups and schedules must agree in both directions; else the live state stays."""
    live = make_trainable(5)
    train(live, 3)
    changed = change(live)
    before = snapshot(changed)
    with pytest.raises(CheckpointError, match=reason):
        checkpointing.load_ckpt(changed, saved)
    assert snapshot(changed) == before


def test_models_and_optimizers_must_be_those_that_were_saved(
    saved: Path, checkpointing: CheckpointFunctions, make_trainable: Make
) -> None:
    """Another name, one model more, or a model without its optimizer is refused."""
    trainable = make_trainable(1)
    with pytest.raises(CheckpointError, match=r"lacks actor\.\w+\..* and has what the live state lacks: model"):
        checkpointing.load_ckpt({"actor": trainable}, saved)
    with pytest.raises(CheckpointError, match="lacks critic"):
        checkpointing.load_ckpt({"model": trainable, "critic": nn.Linear(1, 1)}, saved)
    with pytest.raises(CheckpointError, match="has an optimizer and the call has none"):
        checkpointing.load_ckpt(trainable.model, saved)
    with pytest.raises(ConfigError, match="no parameter of the model"):
        checkpointing.load_ckpt(trainable._replace(optimizer=make_trainable(2).optimizer), saved)


def test_a_plain_model_does_not_become_a_trained_one(tmp_path: Path, checkpointing: CheckpointFunctions) -> None:
    """A checkpoint without optimizer or schedule is refused where the call brings one."""
    model = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    checkpointing.save_ckpt(model, tmp_path, step=1)
    with pytest.raises(CheckpointError, match="has no optimizer and the call has one"):
        checkpointing.load_ckpt(model, tmp_path, optimizer=optimizer)
    checkpointing.save_ckpt(model, tmp_path, step=2, optimizer=optimizer)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer)
    with pytest.raises(CheckpointError, match="has no schedule and the call has one"):
        checkpointing.load_ckpt(model, tmp_path, optimizer=optimizer, scheduler=schedule)


def test_a_refusing_schedule_puts_the_others_back(tmp_path: Path, checkpointing: CheckpointFunctions) -> None:
    """When the second of two schedules refuses its state, the first one is as it was."""

    def make() -> Trainable:
        model = nn.Linear(2, 2)
        optimizer = torch.optim.AdamW(model.parameters())
        return Trainable(model, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step)))

    checkpointing.save_ckpt({"a": make(), "b": make()}, tmp_path)
    first, second = make(), failing_schedule(make())
    for _ in range(2):
        first.optimizer.step()
        first.scheduler.step()  # type: ignore[union-attr]
    before = first.scheduler.state_dict()  # type: ignore[union-attr]
    with pytest.raises(CheckpointError, match="schedule refuses"):
        checkpointing.load_ckpt({"a": first, "b": second}, tmp_path)
    assert first.scheduler.state_dict() == before  # type: ignore[union-attr]


def test_without_a_checkpoint_the_directory_is_named(tmp_path: Path, checkpointing: CheckpointFunctions) -> None:
    """An empty directory, a missing one, a missing step and a file in the place of a directory are named."""
    model = nn.Linear(1, 1)
    for directory in (tmp_path, tmp_path / "none"):
        with pytest.raises(CheckpointError, match="holds no checkpoint"):
            checkpointing.load_ckpt(model, directory)
    with pytest.raises(CheckpointError, match=r"step=3 is not in .*use one of these: none"):
        checkpointing.load_ckpt(model, tmp_path, step=3)
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="cannot be read: Not a directory"):
        checkpointing.load_ckpt(model, tmp_path / "file")


def test_a_checkpoint_can_be_copied(
    saved: Path, tmp_path: Path, checkpointing: CheckpointFunctions, make_trainable: Make
) -> None:
    """A copied directory, or a link to one, loads: nothing in it depends on where it stands."""
    shutil.copytree(saved / "step-00000002", tmp_path / "other" / "step-00000002")
    assert checkpointing.load_ckpt(make_trainable(1), tmp_path / "other").step == 2
    (tmp_path / "other" / "step-00000001").symlink_to(saved / "step-00000001")
    assert checkpointing.load_ckpt(make_trainable(1), tmp_path / "other", step=1).step == 1
