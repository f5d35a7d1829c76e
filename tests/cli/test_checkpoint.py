"""`lightrft checkpoint` on real checkpoints of a small run, on damaged ones, and on what is none."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from contextlib import redirect_stdout, suppress
from pathlib import Path
from typing import cast

import attrs
import pytest
import torch
from cli_runs import REPOSITORY, Cli
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightrft.cli import main
from lightrft.cli.checkpoint.place import CHECKPOINTS_NAME
from lightrft.cli.run_dir import bind_config
from lightrft.config import Config, ModelConfig, StrategyConfig
from lightrft.errors import CheckpointError
from lightrft.loops.run import checkpoint_dir
from lightrft.models.build import build_model_and_tokenizer
from lightrft.models.tokenizer import ModelTokenizer
from lightrft.strategy import Strategy, Trainable, get_strategy
from lightrft.testing.ranks.here import scratch_directory

CONFIG = Config(
    strategy=StrategyConfig(strategy="single", actor_learning_rate=1e-2),
    model=ModelConfig(hidden_size=16, num_layers=1, num_heads=2, max_length=16, alphabet="0123456789+="),
)
CLIENT_STATE = {"rewards": {"mean": 0.1, "worst": float("-inf")}, "note": "n" * 300}


@attrs.frozen(kw_only=True)
class Saved:
    """A run with the steps 3, 6 and 9, and the objects that were saved last."""

    directory: Path
    strategy: Strategy
    actor: Trainable
    tokenizer: ModelTokenizer


def build_actor(strategy: Strategy) -> tuple[Trainable, ModelTokenizer]:
    model, tokenizer = build_model_and_tokenizer(CONFIG.model, seed=0)
    actor, _, _, _ = strategy.prepare_models_and_optimizers(model, None, None, None, None, 9)
    return actor, tokenizer


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    directory = tmp_path_factory.mktemp("made") / "run"
    directory.mkdir()
    bind_config(directory, CONFIG, is_resumed=False)
    strategy = get_strategy(CONFIG)
    strategy.setup_distributed()
    actor, tokenizer = build_actor(strategy)
    tokens_BT = torch.arange(2, 10)[None]
    for step in (3, 6, 9):
        strategy.backward(actor.model(input_ids=tokens_BT, labels=tokens_BT).loss, actor.model, actor.optimizer)
        strategy.optimizer_step(actor.optimizer, actor.model, actor.scheduler)
        models = {"actor": actor, "critic": nn.Linear(2, 3).double()}
        strategy.save_ckpt(models, directory / "checkpoints", step=step, client_state=CLIENT_STATE)
    return Saved(directory=directory, strategy=strategy, actor=actor, tokenizer=tokenizer)


@pytest.fixture
def saved(made: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Saved:
    """A copy of the run to break, as `run` in the current directory."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(made.directory, tmp_path / "run")
    return attrs.evolve(made, directory=tmp_path / "run")


def step_of(saved: Saved, step: int) -> Path:
    return saved.directory / "checkpoints" / f"step-{step:08d}"


def flip(path: Path, position: int = -1) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def leave_half_written(saved: Saved, step: int) -> Path:
    """Leave what a writer leaves that is killed while it writes, and return it."""
    program = (
        "import os, pathlib, sys\n"
        "from lightrft.backends.checkpointing.durable import staging, write_file\n"
        "with staging(pathlib.Path(sys.argv[1])) as content:\n"
        "    write_file(content / 'actor.model.safetensors', [bytes(1000)])\n"
        "    os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run(  # noqa: S603 (our own interpreter)
        [sys.executable, "-c", program, str(step_of(saved, step))],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        check=False,
    )
    assert done.returncode == -9
    (found,) = (saved.directory / "checkpoints").glob(f".step-{step:08d}.tmp-*")
    return found


def tree(directory: Path) -> dict[str, bytes]:
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


def num_bytes(directory: Path) -> int:
    return sum(len(content) for content in tree(directory).values())


def facts(cli: Cli, *argv: str, code: int = 0) -> dict[str, object]:
    """The one JSON object on stdout."""
    outcome = cli("checkpoint", *argv, "--json")
    assert (outcome.code, outcome.err) == (code, ""), outcome
    return cast("dict[str, object]", json.loads(outcome.out))


def rows_of(answer: Mapping[str, object], key: str = "checkpoints") -> list[dict[str, object]]:
    return cast("list[dict[str, object]]", answer[key])


@pytest.mark.parametrize("directory", ["run", "run/checkpoints"])
def test_list_has_a_row_for_each_checkpoint(cli: Cli, saved: Saved, directory: str) -> None:
    """A run's directory or that of its checkpoints: step, time, bytes, strategy, ranks, and that it is there."""
    os.utime(step_of(saved, 6) / "manifest.json", (86400, 86400))
    rows = rows_of(facts(cli, "list", directory))
    assert [row["step"] for row in rows] == [3, 6, 9]
    assert [row["num_bytes"] for row in rows] == [num_bytes(step_of(saved, step)) for step in (3, 6, 9)]
    assert rows[1]["written"] == "1970-01-02T00:00:00+00:00"
    for row in rows:
        shown = {key: row[key] for key in ("strategy", "world_size", "is_committed", "problem")}
        assert shown == {"strategy": "single", "world_size": 1, "is_committed": True, "problem": None}
    lines = cli("checkpoint", "list", directory).out.splitlines()
    assert lines[0].split() == ["step", "written", "size", "strategy", "ranks", "committed"]
    assert [(line.split()[0], line.split()[-1]) for line in lines[1:]] == [("3", "yes"), ("6", "yes"), ("9", "yes")]


@pytest.mark.parametrize("key", ["fsdp2", "deepspeed"])
def test_every_strategy_leaves_its_name(cli: Cli, tmp_path: Path, key: str) -> None:
    """A checkpoint of a sharding backend is listed, verified and exported as one of `single` is."""
    strategy = get_strategy({"strategy": key, "actor_learning_rate": 1e-2})
    strategy.setup_distributed()
    try:
        actor, _, _, _ = strategy.prepare_models_and_optimizers(nn.Linear(3, 2), None, None, None, None, 2)
        strategy.save_ckpt(actor, tmp_path, step=1)
        weights = {name: tensor.clone() for name, tensor in strategy.named_tensors(actor.model)}
    finally:
        strategy.teardown()
    (row,) = rows_of(facts(cli, "list", str(tmp_path)))
    assert (row["strategy"], row["world_size"], row["is_committed"]) == (key, 1, True)
    assert facts(cli, "verify", str(tmp_path))["is_intact"] is True
    facts(cli, "export", str(tmp_path), str(tmp_path / "out"))
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == weights.keys()
    assert all(torch.equal(written[name], weights[name].cpu()) for name in weights)


def test_list_says_what_is_no_checkpoint(cli: Cli, saved: Saved) -> None:
    """A killed writer's directory, a foreign one, a lost and a damaged manifest each have a row that says so."""
    half = leave_half_written(saved, 12)
    step_of(saved, 99).mkdir()
    (step_of(saved, 99) / "notes.txt").write_text("mine")
    (step_of(saved, 6) / "manifest.json").unlink()
    flip(step_of(saved, 9) / "manifest.json", 40)
    (saved.directory / "checkpoints" / "step-x").mkdir()
    rows = {cast("int", row["step"]): row for row in rows_of(facts(cli, "list", "run"))}
    assert {step: row["is_committed"] for step, row in rows.items()} == {
        3: True,
        6: False,
        9: True,
        12: False,
        99: False,
    }
    problems = {step: str(row["problem"]) for step, row in rows.items()}
    assert problems[3] == "None"
    assert "manifest.json cannot be read: No such file" in problems[6]
    assert "manifest.json is damaged" in problems[9]
    assert f"{half.name} is unfinished" in problems[12]
    assert rows[12]["num_bytes"] == num_bytes(half) > 1000
    assert "is no checkpoint" in problems[99]
    assert f"-         -      no: {half.parent}" in cli("checkpoint", "list", str(saved.directory)).out


def test_verify_finds_nothing_wrong_with_what_was_written(cli: Cli, saved: Saved) -> None:
    """Whole checkpoints verify, all bytes of their files but the manifests' are read, and foreign ones play no part."""
    leave_half_written(saved, 12)
    step_of(saved, 99).mkdir()
    answer = facts(cli, "verify", "run")
    assert answer["is_intact"] is True
    assert [row["step"] for row in rows_of(answer)] == [3, 6, 9]
    manifests = sum((step_of(saved, step) / "manifest.json").stat().st_size for step in (3, 6, 9))
    assert answer["num_bytes"] == sum(num_bytes(step_of(saved, step)) for step in (3, 6, 9)) - manifests
    outcome = cli("checkpoint", "verify", "run")
    assert (outcome.code, len(outcome.out.splitlines())) == (0, 3)


@pytest.mark.parametrize("position", [0, 700, -1])
def test_verify_names_every_damaged_file(cli: Cli, saved: Saved, position: int) -> None:
    """A flipped bit, a lost and a shortened file are named with their step, and nothing else is; exit code 1."""
    flip(step_of(saved, 6) / "actor.model.safetensors", position)
    (step_of(saved, 6) / "rank-00000.random.json").unlink()
    cut = step_of(saved, 9) / "actor.state.json"
    cut.write_bytes(cut.read_bytes()[:-1])
    answer = facts(cli, "verify", "run", code=1)
    damaged = {row["step"]: sorted(cast("dict[str, str]", row["damaged"])) for row in rows_of(answer)}
    assert damaged == {3: [], 6: ["actor.model.safetensors", "rank-00000.random.json"], 9: ["actor.state.json"]}
    assert answer["is_intact"] is False
    outcome = cli("checkpoint", "verify", "run", "--step", "9")
    assert (outcome.code, outcome.err) == (1, "")
    assert outcome.out.splitlines()[0] == "step 9: damaged in actor.state.json"
    assert cli("checkpoint", "verify", "run", "--step=3").code == 0


@pytest.mark.parametrize("file", ["manifest.json", "client_state.json", "actor.optimizer.safetensors"])
def test_verify_and_loading_mean_the_same(cli: Cli, saved: Saved, file: str) -> None:
    """What `load_ckpt` refuses is what `verify` names, in the same words."""
    flip(step_of(saved, 9) / file, 60)
    named = cast("dict[str, str]", rows_of(facts(cli, "verify", "run", "--step=9", code=1))[0]["damaged"])
    actor, _ = build_actor(saved.strategy)
    with pytest.raises(CheckpointError) as refused:
        saved.strategy.load_ckpt({"actor": actor, "critic": nn.Linear(2, 3).double()}, "run/checkpoints", step=9)
    assert list(named) == [file]
    assert str(refused.value).startswith(named[file])


def test_a_checkpoint_without_its_manifest_is_damaged(cli: Cli, saved: Saved) -> None:
    """It is not passed over, neither by `verify` nor as the newest one."""
    (step_of(saved, 9) / "manifest.json").unlink()
    assert list(cast("dict[str, str]", rows_of(facts(cli, "verify", "run", code=1))[-1]["damaged"])) == [
        "manifest.json"
    ]
    for argv in (["show", "run"], ["export", "run", "out"]):
        outcome = cli("checkpoint", *argv)
        assert (outcome.code, outcome.out) == (1, "")
        assert "step-00000009/manifest.json cannot be read" in outcome.line


@pytest.mark.parametrize("mine", [True, False])
def test_verify_passes_over_what_a_run_removes_meanwhile(
    cli: Cli, saved: Saved, monkeypatch: pytest.MonkeyPatch, mine: bool
) -> None:
    """A checkpoint that goes while it is read is not damaged, and is said to be gone; a file that goes is damage."""

    def remove_while_reading(path: Path, *args: object, **keywords: object) -> object:
        if path == step_of(saved, 3) / "client_state.json":
            shutil.rmtree(path.parent) if mine else path.unlink()
        return original(path, *args, **keywords)

    original = Path.lstat
    monkeypatch.setattr(Path, "lstat", remove_while_reading)
    answer = facts(cli, "verify", str(saved.directory), code=0 if mine else 1)
    assert answer["removed_meanwhile"] == ([3] if mine else [])
    assert [row["step"] for row in rows_of(answer)] == ([6, 9] if mine else [3, 6, 9])


def read_all(terminal: int) -> str:
    """Return what was written to a terminal whose other end is closed; one read gives one part of it."""
    parts: list[bytes] = []
    with suppress(OSError):  # so Linux says that there is no more
        while part := os.read(terminal, 1 << 16):
            parts.append(part)
    return b"".join(parts).decode()


def test_verify_shows_a_bar_on_a_terminal_alone(saved: Saved) -> None:
    """On a terminal stderr gets a bar in bytes; stdout stays the same, one JSON object."""
    main_end, other_end = os.openpty()
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "TERM": "xterm"}
    argv = [sys.executable, "-m", "lightrft", "checkpoint", "verify", str(saved.directory), "--json"]
    done = subprocess.run(argv, stdout=subprocess.PIPE, stderr=other_end, env=environment, check=False)  # noqa: S603 (our own interpreter)
    os.close(other_end)
    shown = read_all(main_end)
    os.close(main_end)
    assert (done.returncode, json.loads(done.stdout)["is_intact"]) == (0, True)
    assert "verifying" in shown
    assert re.search(r"([1-9][0-9.]*)/\1 kB", shown), shown  # it gets to the end


def test_show_counts_what_is_there(cli: Cli, saved: Saved) -> None:
    """Tensors, elements and dtypes of models and optimizers are those of the live ones; the client state is there."""
    answer = facts(cli, "show", "run")
    assert (answer["step"], answer["strategy"], answer["world_size"]) == (9, "single", 1)
    assert cast("dict[str, str]", answer["libraries"])["torch"] == torch.__version__
    assert set(cast("dict[str, int]", answer["files"])) == set(tree(step_of(saved, 9))) - {"manifest.json"}
    models = cast("dict[str, dict[str, object]]", answer["models"])
    parameters = dict(saved.actor.model.named_parameters())
    number, elements = len(parameters), sum(parameter.numel() for parameter in parameters.values())
    own = {key: models["actor"][key] for key in ("num_tensors", "num_elements", "dtypes")}
    assert own == {"num_tensors": number, "num_elements": elements, "dtypes": {"float32": elements}}
    assert models["actor"]["optimizer"] == {
        "num_tensors": 3 * number,
        "num_elements": 2 * elements + number,
        "dtypes": {"float32": 2 * elements + number},
    }
    assert models["critic"] == {"num_tensors": 2, "num_elements": 9, "dtypes": {"float64": 9}, "optimizer": None}
    state = cast("dict[str, object]", answer["client_state"])
    assert state["note"] == CLIENT_STATE["note"]
    assert state["rewards"] == {"mean": 0.1, "worst": {"$float": "-inf"}}
    shown = cli("checkpoint", "show", "run", "--step", "3").out
    assert f"{number}       {elements:,}     float32 {elements:,}" in shown
    assert '  rewards: {"mean": 0.1,' in shown
    assert "(302 characters; --json shows them all)" in shown


def test_show_trusts_no_damaged_client_state(cli: Cli, saved: Saved) -> None:
    """What is printed of the user's state was verified."""
    flip(step_of(saved, 9) / "client_state.json", 20)
    outcome = cli("checkpoint", "show", "run", "--json")
    assert (outcome.code, outcome.out) == (1, "")
    assert "client_state.json is damaged" in outcome.line


def test_export_writes_what_save_model_writes(cli: Cli, saved: Saved) -> None:
    """The directory equals that of `save_model` byte for byte, and transformers computes the same logits with it."""
    answer = facts(cli, "export", "run", "out")
    saved.strategy.save_model(saved.actor.model, "live", tokenizer=saved.tokenizer)
    assert tree(Path("out")) == tree(Path("live"))
    assert (answer["step"], answer["model"], answer["missing"]) == (9, "actor", None)
    assert answer["files"] == sorted(tree(Path("live")))
    tokens_BT = torch.tensor([AutoTokenizer.from_pretrained("out").encode("1+2=")])
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained("out").eval()(tokens_BT).logits
        assert torch.equal(logits, saved.actor.model.eval()(tokens_BT).logits)
    older = facts(cli, "export", "run/checkpoints", "older", "--step", "6")
    assert older["step"] == 6
    assert tree(Path("older"))["config.json"] == tree(Path("out"))["config.json"]
    assert tree(Path("older"))["model.safetensors"] != tree(Path("out"))["model.safetensors"]


def test_export_reads_a_finished_runs_own_description(cli: Cli, saved: Saved) -> None:
    """Where the model that the run began with has gone, the one that the run wrote describes it too."""
    saved.strategy.save_model(saved.actor.model, "run/model", tokenizer=saved.tokenizer)
    config = saved.directory / "config.toml"
    config.write_text(config.read_text().replace("[model]", '[model]\npath = "gone"'))
    assert facts(cli, "export", "run", "out")["missing"] is None
    out, model = tree(Path("out")), tree(Path("run/model"))
    assert out.keys() == model.keys()
    # transformers notes in `tokenizer_config.json` that a tokenizer was loaded
    assert all(out[file] == model[file] for file in out if file != "tokenizer_config.json")


@pytest.mark.parametrize("why", ["no config", "no model", "another model"])
def test_export_says_what_the_run_does_not_hold(cli: Cli, saved: Saved, why: str) -> None:
    """Without a description of this very model the weights are written alone, and the rest is named."""
    config, argv, name = saved.directory / "config.toml", ["export", "run", "out"], "actor"
    if why == "no config":
        config.unlink()
    elif why == "no model":
        config.write_text(config.read_text().replace("[model]", '[model]\npath = "gone"'))
    else:
        argv, name = [*argv, "--model", "critic"], "critic"
    outcome = cli("checkpoint", *argv)
    assert (outcome.code, outcome.err) == (0, "")
    assert list(tree(Path("out"))) == ["model.safetensors"]
    missing = outcome.out.splitlines()[-1]
    assert missing.startswith("missing: the configuration and the tokenizer")
    words = {
        "no config": "neither config.toml nor model/config.json",
        "no model": "path='gone' is not a directory",
        "another model": "config.toml describes another model: the checkpoint lacks",
    }
    assert words[why] in missing
    written, live = load_file("out/model.safetensors"), dict(saved.actor.model.named_parameters())
    if name == "actor":
        assert written.keys() == live.keys()
        assert all(torch.equal(written[key], live[key]) for key in live)
    else:
        assert {key: (tensor.dtype, list(tensor.shape)) for key, tensor in written.items()} == {
            "weight": (torch.float64, [3, 2]),
            "bias": (torch.float64, [3]),
        }


@pytest.mark.parametrize("file", ["actor.model.safetensors", "actor.state.json"])
def test_export_refuses_damaged_weights(cli: Cli, saved: Saved, file: str) -> None:
    """A flipped bit in the model's own files is named and nothing is written; elsewhere it plays no part."""
    flip(step_of(saved, 9) / "actor.optimizer.safetensors")
    assert cli("checkpoint", "export", "run", "whole").code == 0
    flip(step_of(saved, 9) / file)
    outcome = cli("checkpoint", "export", "run", "out")
    assert (outcome.code, outcome.out) == (1, "")
    assert f"{file} is damaged" in outcome.line
    assert not Path("out").exists()


def test_export_overwrites_nothing(cli: Cli, saved: Saved) -> None:
    """An output directory that holds something stays as it is."""
    before = tree(saved.directory)
    outcome = cli("checkpoint", "export", "run", "run")
    assert (outcome.code, outcome.out) == (1, "")
    assert "is not an empty directory" in outcome.line
    assert tree(saved.directory) == before


def test_prune_removes_all_but_the_newest(cli: Cli, saved: Saved) -> None:
    """A dry run changes nothing and says what then goes; what is foreign, unfinished, linked or damaged stays."""
    half = leave_half_written(saved, 1)
    step_of(saved, 2).mkdir()
    (step_of(saved, 2) / "manifest.json").write_text("{}")
    elsewhere = saved.strategy.save_ckpt(saved.actor, saved.directory / "elsewhere", step=4)
    step_of(saved, 4).symlink_to(elsewhere, target_is_directory=True)
    before = tree(saved.directory)
    dry = facts(cli, "prune", "run", "--max-num", "2", "--dry-run")
    assert tree(saved.directory) == before
    expected = {"step": 3, "path": "run/checkpoints/step-00000003", "num_bytes": num_bytes(step_of(saved, 3))}
    assert dry["removed"] == [expected]
    assert (dry["num_bytes"], dry["is_dry_run"], dry["staying"]) == (expected["num_bytes"], True, [2, 4, 6, 9])
    real = facts(cli, "prune", "run", "--max-num", "2")
    assert {**real, "is_dry_run": True} == dry
    assert tree(saved.directory) == {path: content for path, content in before.items() if "step-00000003" not in path}
    assert half.is_dir()
    outcome = cli("checkpoint", "prune", "run", "--max-num=1", "--dry-run")
    assert "6     " in outcome.out
    assert "run/checkpoints/step-00000006" in outcome.out
    assert outcome.out.splitlines()[-1].startswith("1 would be removed, ")
    assert outcome.out.endswith(" bytes); steps that stay: 2, 4, 9\n")
    assert cli("checkpoint", "prune", "run", "--max-num=2").out == (
        "0 removed, 0 B (0 bytes); steps that stay: 2, 4, 6, 9\n"
    )


@pytest.mark.parametrize("damage", ["flipped bit", "lost file", "lost manifest"])
def test_prune_removes_nothing_beside_a_damaged_newest(cli: Cli, saved: Saved, damage: str) -> None:
    """Where the newest checkpoint is damaged, older ones are what is left: one line says so, and nothing goes."""
    file = step_of(saved, 9) / ("manifest.json" if damage == "lost manifest" else "actor.model.safetensors")
    if damage == "flipped bit":
        flip(file, -1)
    else:
        file.unlink()
    before = tree(saved.directory)
    outcome = cli("checkpoint", "prune", "run", "--max-num", "1")
    assert (outcome.code, outcome.out) == (1, "")
    assert f"run/checkpoints/step-00000009/{file.name} " in outcome.line
    assert "so nothing was removed; remove run/checkpoints/step-00000009 by hand first." in outcome.line
    assert tree(saved.directory) == before
    shutil.rmtree(step_of(saved, 9))
    assert cli("checkpoint", "prune", "run", "--max-num", "1").code == 0
    assert sorted(path.name for path in (saved.directory / "checkpoints").iterdir()) == ["step-00000006"]


@attrs.frozen(kw_only=True)
class Kept:
    """Checkpoints by step, with metric and bytes that are saved beside the model, and what the last save was told."""

    saves: tuple[tuple[int, float | None, int], ...]
    max_num: int | None
    max_kilobytes: int | None
    keep_every: int
    keep_best: int


@st.composite
def kept_cases(draw: st.DrawFn) -> Kept:
    steps = sorted(draw(st.sets(st.integers(0, 12), min_size=2, max_size=6)))
    metrics = st.sampled_from([None, -1.0, 0.0, 0.5, 0.5, 1e300])
    max_num = draw(st.none() | st.integers(1, 4))
    # a checkpoint has about 20 kB without its padding
    max_kilobytes = draw(st.integers(0, 120) if max_num is None else st.none() | st.integers(0, 120))
    return Kept(
        saves=tuple((step, draw(metrics), draw(st.integers(0, 20_000))) for step in steps),
        max_num=max_num,
        max_kilobytes=max_kilobytes,
        keep_every=draw(st.integers(0, 4)),
        keep_best=draw(st.integers(0, 3)),
    )


def flags(case: Kept) -> list[str]:
    """The rules of a case as a command line has them; what is off is left out or said, by chance of the numbers."""
    found = [] if case.max_num is None else [f"--max-num={case.max_num}"]
    found += [] if case.max_kilobytes is None else [f"--max-mem={case.max_kilobytes * 1e-6!r}"]
    found += [f"--keep-every={case.keep_every}"] if case.keep_every != 1 else ["--keep-every", "1"]
    return found + ([f"--keep-best={case.keep_best}"] if case.keep_best else [])


def pruned(directory: Path, *argv: str) -> dict[str, object]:
    out = io.StringIO()
    with redirect_stdout(out):
        assert main(["checkpoint", "prune", str(directory), *argv, "--json"]) == 0
    return cast("dict[str, object]", json.loads(out.getvalue()))


@settings(max_examples=40)
@given(case=kept_cases())
def test_prune_keeps_what_save_ckpt_keeps(made: Saved, case: Kept) -> None:
    """Its rules are those of `save_ckpt`: a save without limits and `prune` leave what a save with them leaves."""

    def save(directory: Path, number: int, **rules: float | None) -> None:
        step, metric, padding = case.saves[number]
        state = {"padding": "x" * padding}
        made.strategy.save_ckpt(nn.Linear(1, 1), directory, step=step, metric=metric, client_state=state, **rules)  # type: ignore[arg-type]

    with scratch_directory() as scratch:
        by_saving, by_pruning = scratch / "saving", scratch / "pruning"
        for number in range(len(case.saves) - 1):
            save(by_saving, number)
        shutil.copytree(by_saving, by_pruning)
        max_mem = None if case.max_kilobytes is None else case.max_kilobytes * 1e-6
        rules = {"max_num": case.max_num, "keep_every": case.keep_every, "keep_best": case.keep_best}
        save(by_saving, -1, max_mem=max_mem, **rules)
        save(by_pruning, -1)
        stay = sorted(path.name for path in by_saving.iterdir())
        before = tree(by_pruning)
        dry = pruned(by_pruning, *flags(case), "--dry-run")
        assert tree(by_pruning) == before
        assert [f"step-{step:08d}" for step in cast("list[int]", dry["staying"])] == stay
        real = pruned(by_pruning, *flags(case))
        assert {**real, "is_dry_run": True} == dry
        assert sorted(path.name for path in by_pruning.iterdir()) == stay
        assert tree(by_pruning) == {path: content for path, content in before.items() if path.split("/")[0] in stay}


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "no action is given; use one of list, verify, show, export, import, prune"),
        (["verfy", "run"], "action='verfy' is not known; did you mean 'verify'?"),
        (["list"], "0 directories are given, and list takes 1: lightrft checkpoint list DIR."),
        (["export", "run"], "1 directories are given, and export takes 2: lightrft checkpoint export DIR OUT."),
        (["list", "none"], "directory='none' is not a directory; name the directory of a run"),
        (["list", "empty"], "directory='empty' holds no checkpoint"),
        (["verify", "empty"], "directory='empty' holds no checkpoint"),
        (["verify", "foreign"], "directory='foreign' holds no checkpoint"),
        (["prune", "empty", "--max-num=1"], "directory='empty' holds no checkpoint"),
        (["show", "run/checkpoints/step-00000003"], "is one checkpoint; name the one above, and --step=3."),
        (["verify", "run", "--step=7"], "--step=7 is not in 'run/checkpoints'; use a step that is, such as 3, 6, 9."),
        (["show", "run", "--step=-1"], "--step=-1 is not in"),
        (["export", "run", "out", "--step=10"], "--step=10 is not in"),
        (
            ["export", "run", "out", "--model", "critc"],
            "--model='critc' is not in run/checkpoints/step-00000009; did you",
        ),
        (["prune", "run"], "--max-num and --max-mem are missing, and nothing goes without a limit"),
        (["prune", "run", "--keep-best=1"], "--max-num and --max-mem are missing"),
        (["prune", "run", "--max-mem=-0.5"], "--max-mem=-0.5 is not a finite number of at least 0; give GB"),
        (["prune", "run", "--max-mem=nan"], "--max-mem=nan is not a finite number"),
        (["prune", "run", "--max-mem=inf"], "--max-mem=inf is not a finite number"),
        (["prune", "run", "--max-num=1", "--keep-every=-1"], "--keep-every=-1 is below 0; use 0 to spare none"),
        (["prune", "run", "--max-num=1", "--keep-best=-2"], "--keep-best=-2 is below 0"),
        (["verify", "run", "--keep-best=2"], "--keep-best says nothing to verify; leave it out, it is for prune."),
        (["prune", "run", "--max-num=0"], "--max-num=0 would remove the newest checkpoint"),
        (["prune", "run", "--max-num=1", "--step=3"], "--step says nothing to prune; leave it out, it is for verify"),
        (["list", "run", "--dry-run"], "--dry-run says nothing to list; leave it out, it is for import, prune."),
    ],
)
def test_wrong_input_is_one_line(cli: Cli, saved: Saved, argv: list[str], words: str) -> None:
    """What cannot be meant ends with exit code 2 and one line that says what can, also under `--json`."""
    Path("empty").mkdir()
    Path("foreign", "step-00000001").mkdir(parents=True)
    before = tree(saved.directory)
    for extra in ([], ["--json"]):
        outcome = cli("checkpoint", *argv, *extra)
        assert (outcome.code, outcome.out) == (2, "")
        assert words in outcome.line
    assert tree(saved.directory) == before
    assert not Path("out").exists()


def test_a_model_is_asked_for_where_none_is_the_usual_one(cli: Cli, saved: Saved) -> None:
    """The only model needs no name; among several without an actor one must be named."""
    saved.strategy.save_ckpt(nn.Linear(1, 1), "one", step=1)
    saved.strategy.save_ckpt({"a": nn.Linear(1, 1), "b": nn.Linear(1, 1)}, "two", step=1)
    assert facts(cli, "export", "one", "out")["model"] == "model"
    outcome = cli("checkpoint", "export", "two", "other")
    assert outcome.code == 2
    assert "--model is missing, and two/step-00000001 holds a, b; name one of them." in outcome.line


@pytest.mark.parametrize(
    "argv", [["--help"], ["list", "run"], ["verify", "run"], ["prune", "run", "--max-num=1", "--dry-run"]]
)
def test_what_reads_no_tensor_imports_no_torch(saved: Saved, argv: list[str]) -> None:
    """Listing, verifying and pruning answer without torch."""
    program = (
        "import sys; from lightrft.cli import main; code = main(['checkpoint', *sys.argv[1:]]); "
        "sys.exit('torch was imported' if 'torch' in sys.modules else code)"
    )
    done = subprocess.run(  # noqa: S603 (our own interpreter)
        [sys.executable, "-c", program, *argv],
        cwd=saved.directory.parent,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout


def test_the_place_is_that_of_the_loop() -> None:
    """The command looks where a run writes."""
    assert checkpoint_dir(CONFIG) == Path(CONFIG.run.dir) / CHECKPOINTS_NAME
