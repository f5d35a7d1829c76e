from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import attrs
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from lightrft.config import Config, apply_overrides, as_mapping, from_mapping, from_toml, load_config, to_toml
from lightrft.config._names import one_edit, sections, setting_fields
from lightrft.config.dump import _value
from lightrft.errors import ConfigError
from lightrft.testing.cases.configs import configs

SETTINGS = [(section, name) for section, kind in sections(Config).items() for name in setting_fields(kind)]
# Values of every TOML type; those of the setting's own type are left out below.
WRONG = {
    "integer": 7,
    "float": 2.7,
    "bool": True,
    "string": "4",
    "array": [[]],
    "table": {"a": 1},
    "not-finite": float("inf"),
}


def _accepted(section: str, name: str) -> set[str]:
    default = getattr(getattr(Config(), section), name)
    optional = {key: {"integer", "float"} for key in ("algorithm.dual_clip", "checkpoint.max_mem")}
    kinds: dict[type, set[str]] = {
        bool: {"bool"},
        int: {"integer"},
        float: {"integer", "float"},
        str: {"string"},
        dict: {"table"},
        tuple: set(),
        type(None): optional.get(f"{section}.{name}", {"string"}),
    }
    return kinds[type(default)]


def _typos(name: str) -> st.SearchStrategy[str]:
    letters = st.sampled_from("abcxyz_1")
    places = st.integers(0, len(name) - 1)
    return st.one_of(
        st.builds(lambda i, c: name[:i] + c + name[i:], places, letters),
        st.builds(lambda i: name[:i] + name[i + 1 :], places),
        st.builds(lambda i, c: name[:i] + c + name[i + 1 :], places, letters),
        st.builds(lambda i: name[:i] + name[i : i + 2][::-1] + name[i + 2 :], places),
    )


def _message(mapping: object, **options: str) -> str:
    with pytest.raises(ConfigError) as caught:
        from_mapping(mapping, **options)  # type: ignore[arg-type]
    return str(caught.value)


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.too_slow])
@given(configs())
def test_round_trips(config: Config) -> None:
    """A config reads back equal from its mapping and from its TOML."""
    assert from_mapping(as_mapping(config)) == config
    assert from_mapping(tomllib.loads(to_toml(config))) == config


@settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.too_slow])
@given(configs())
def test_overrides_equal_the_file(config: Config) -> None:
    """Every setting given on the command line as TOML writes it means the same as in the file."""
    pairs = [(section, name, value) for section, table in as_mapping(config).items() for name, value in table.items()]  # type: ignore[attr-defined]
    overrides = [f"{section}.{name}={_value(value, (name,))}" for section, name, value in pairs if value is not None]
    assert load_config(None, overrides) == config


@pytest.mark.parametrize(
    ("section", "name", "wrong"),
    [(*place, wrong) for place in SETTINGS for wrong in sorted(WRONG.keys() - _accepted(*place))],
)
def test_wrong_types_are_refused(section: str, name: str, wrong: str) -> None:
    """A value of another TOML type is refused for every setting, with its full path and the source."""
    message = _message({section: {name: WRONG[wrong]}}, source="run.toml")
    assert message.startswith(f"run.toml: {section}.{name}=")
    assert "\n" not in message


@pytest.mark.parametrize(("section", "name"), SETTINGS)
def test_none_is_refused_but_for_what_may_be_none(section: str, name: str) -> None:
    """None stands only for a setting whose default it is."""
    if getattr(getattr(Config(), section), name) is None:
        assert from_mapping({section: {name: None}}) == Config()
    else:
        assert _message({section: {name: None}}).startswith(f"config: {section}.{name}=None is not ")


@settings(deadline=None, max_examples=100)
@given(st.data(), st.sampled_from([*SETTINGS, *((section, "") for section in sections(Config))]))
def test_every_typo_is_refused(data: st.DataObject, place: tuple[str, str]) -> None:
    """One edit of any key at any depth is an error with the path written, and the key that was meant is suggested."""
    section, name = place
    known = setting_fields(sections(Config)[section]) if name else sections(Config)
    right = name or section
    typo = data.draw(_typos(right))
    assume(typo not in known)
    message = _message({section: {typo: 1}} if name else {typo: {}})
    path = [section, typo] if name else [typo]
    written = ".".join(part or '""' for part in path)
    assert message.startswith(
        f"config: {written}=1 is not a setting of {section}" if name else f"config: {written} is not a"
    )
    suggested = message.split("did you mean ")[1].split("?")[0].split(" or ")
    assert repr(right) in suggested
    assert all(one_edit(typo, other.strip("'")) for other in suggested)


@settings(deadline=None, max_examples=100)
@given(st.data(), st.sampled_from(SETTINGS))
def test_every_typo_in_an_override_is_refused(data: st.DataObject, place: tuple[str, str]) -> None:
    """A misspelt key or section of an override is refused with the one that was meant."""
    section, name = place
    typo = data.draw(_typos(name))
    assume(typo not in setting_fields(sections(Config)[section]))
    with pytest.raises(ConfigError, match=rf"^command line: {section}\..* is not a setting of .*'{name}'"):
        load_config(None, [f"{section}.{typo}=1"])
    wrong_section = data.draw(_typos(section))
    assume(wrong_section not in sections(Config))
    with pytest.raises(ConfigError, match=rf"^command line: .* is not a section; .*'{section}'"):
        load_config(None, [f"{wrong_section}.{name}=1"])


def test_all_problems_are_said_at_once() -> None:
    """Each thing that is wrong has a line of its own with source and path."""
    message = _message(
        {"strategy": {"max_norn": 1, "seed": 2.7}, "enigne": {"type": "hf"}, "run": 3, 4: 5, "max_norm": 2},
        source="run.toml",
    )
    assert [line.partition(";")[0] for line in message.splitlines()] == [
        "run.toml: strategy.seed=2.7 is not an integer",
        "run.toml: strategy.max_norn=1 is not a setting of strategy",
        "run.toml: run=3 is not a table",
        "run.toml: 4=5 is not a section",
        "run.toml: enigne is not a section",
        "run.toml: max_norm=2 is not a section",
    ]
    assert "did you mean 'strategy.max_norm'?" in message


def test_settings_at_odds_get_the_path() -> None:
    """What a record says about several settings together is prefixed with the section."""
    message = _message({"strategy": {"train_batch_size": 6, "micro_train_batch_size": 4}})
    assert message.startswith("config: strategy.train_batch_size=6 is not divisible by micro_train_batch_size(4)")
    assert _message({"data": {"task": "a", "path": "b"}}).startswith("config: data.path='b' and task='a' are both set")
    assert _message({"data": {"template": "x"}}).startswith("config: data.template='x' does not hold {question}")
    assert "config: model.hidden_size=10 is not" in _message({"model": {"hidden_size": 10}})
    assert "config: model.num_heads=4 is not" in _message({"model": {"num_key_value_heads": 3}})


@pytest.mark.parametrize(
    ("options", "place"),
    [
        ({"x": object()}, "data.task_options.x="),
        ({"x": [1, None]}, "data.task_options.x[1]=None"),
        ({"x": {1: 2}}, "data.task_options.x has the key 1"),
        ({"x": {"y": float("nan")}}, "data.task_options.x.y=nan"),
        ({1: 2}, "data.task_options={1: 2} is not a table"),
    ],
)
def test_task_options_are_plain_data(options: object, place: str) -> None:
    """The options of a task hold what a TOML file can hold, and an error names the place at any depth."""
    assert _message({"data": {"task_options": options}}).startswith(f"config: {place}")


@pytest.mark.parametrize(
    "url", ["localhost:30000", "ftp://a:1", "http://a:1/generate", "http://me:secret@a:1", "http://"]
)
def test_what_is_no_address_of_a_server_is_refused(url: str) -> None:
    """An address is a scheme, a host and a port: no path, and no secret that messages would show."""
    assert "is no address of a server" in _message({"engine": {"url": url}})


def test_other_errors_are_not_dressed_up() -> None:
    """An exception that is no ConfigError of ours leaves the reading as it is."""

    class Broken(dict[str, object]):
        def __getitem__(self, key: str) -> object:
            raise KeyError(key)

    with pytest.raises(KeyError, match="seed"):
        from_mapping({"strategy": Broken(seed=1)})


def test_a_written_secret_is_refused() -> None:
    """What was printed in the place of a secret is no value: reading it says what to set."""
    mapping = {"strategy": {"extra_args": {"a": [{"hf_token": "***"}], "stars": "***"}}}
    message = (
        "config: strategy.extra_args.a.hf_token='***' stands for a secret that was not printed; set the secret, or "
    )
    assert _message(mapping) == f"{message}remove the line."


def test_an_error_shows_no_secret() -> None:
    """A secret under a key that is none of ours is not printed by the error about that key."""
    assert "config: data.wandb_api_key='***' is not a setting" in _message({"data": {"wandb_api_key": "s3cret"}})


def _write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def test_from_toml(tmp_path: Path) -> None:
    """A file is read, with or without a byte order mark and in either kind of line ends; the source is its path."""
    path = _write(tmp_path / "run.toml", b"\xef\xbb\xbf[strategy]\r\nseed = 7\r\n")
    assert from_toml(path) == from_toml(str(path)) == from_mapping({"strategy": {"seed": 7}})
    _write(path, b"[strategy]\nsed = 7\n")
    with pytest.raises(ConfigError) as caught:
        from_toml(path)
    assert str(caught.value).startswith(f"{path}: strategy.sed=7 is not a setting of strategy; did you mean 'seed'?")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"a = 1\na = 2\n", "is not TOML at line 2, column 6 (Cannot overwrite a value); correct it there."),
        (
            b"\n\nfoo bar",
            "is not TOML at line 3, column 5 (Expected '=' after a key in a key/value pair); correct it there.",
        ),
        (b"x = 1\ny = [1,\n", "is not TOML at line 3, column 1 (Invalid value); correct it there."),
        (b"x = ", "is not TOML at line 1, column 5 (Invalid value); correct it there."),
        (b"x = 1\ny = '\xff'\n", "is not UTF-8 at line 2, column 6; save it as UTF-8."),
        (b"x = " + b"[" * 100_000, "is nested too deeply; use fewer brackets within one another."),
        (b"x = " + b"1" * 5_000, "Exceeds the limit"),
    ],
)
def test_malformed_files(tmp_path: Path, content: bytes, problem: str) -> None:
    """A file that is not TOML is named, with the line and the column where there is one."""
    path = _write(tmp_path / "run.toml", content)
    with pytest.raises(ConfigError) as caught:
        from_toml(path)
    assert str(caught.value).startswith(f"config={str(path)!r} is not ") or "nested" in problem
    assert problem in str(caught.value)


def test_unreadable_files(tmp_path: Path) -> None:
    """A file that is missing, a directory, no path at all or not permitted is one line that names it."""
    with pytest.raises(ConfigError, match=r"none.toml' does not exist; check the path\.$"):
        from_toml(tmp_path / "none.toml")
    with pytest.raises(ConfigError, match=r"is a directory; name the TOML file in it\.$"):
        from_toml(tmp_path)
    with pytest.raises(ConfigError, match=r"is not a path \(embedded null byte\)"):
        from_toml("run\0.toml")
    loop = tmp_path / "loop.toml"
    loop.symlink_to(loop)
    with pytest.raises(ConfigError, match=r"loop.toml' cannot be read \(.+\); check the file"):
        from_toml(loop)


def test_load_config(tmp_path: Path) -> None:
    """The command line stands above the file, the file above the defaults; without a file there are the defaults."""
    path = _write(tmp_path / "run.toml", b"[strategy]\nseed = 7\nmax_norm = 3\n[data.task_options]\na = 1\n")
    config = load_config(path, ["strategy.seed=8", "strategy.seed=9", " run.num_steps = 5", "data.task_options.b.c=2"])
    assert (config.strategy.seed, config.strategy.max_norm, config.run.num_steps) == (9, 3.0, 5)
    assert config.data.task_options == {"a": 1, "b": {"c": 2}}
    assert load_config(None) == Config()


def test_load_config_says_who_is_to_blame(tmp_path: Path) -> None:
    """A line is about the file, about the command line, or about both where settings of both are at odds."""
    path = _write(
        tmp_path / "run.toml", b"[strategy]\ntrain_batch_size = 6\n[run]\nnum_steps = 'x'\n[model]\nhidden_size = 9\n"
    )
    with pytest.raises(ConfigError) as caught:
        load_config(path, ["strategy.micro_train_batch_size=4", "run.threads=x"])
    assert [line.partition("=")[0] for line in str(caught.value).splitlines()] == [
        f"{path} and command line: strategy.train_batch_size",
        f"{path}: model.hidden_size",
        f"{path}: run.num_steps",
        "command line: run.threads",
    ]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("runs/first", "runs/first"),
        ("", ""),
        ("a = b", "a = b"),
        ('"2026"', "2026"),
        ("'2026'", "2026"),
        ("2026", 2026),
        ("1e-5", 1e-5),
        ("true", True),
        ("True", "True"),
        ("[1, 2]", [1, 2]),
        ("{a = 1}", {"a": 1}),
        ("{question} =", "{question} ="),
        ("1 # no comment", "1 # no comment"),
        ("1, other = 2", "1, other = 2"),
        ("1}\nother = {a = 2", "1}\nother = {a = 2"),
        ("1\n[other]", "1\n[other]"),
        ("[" * 10_000, "[" * 10_000),
    ],
)
def test_override_values(text: str, value: object) -> None:
    """A value is one whole TOML value, and every other text is a string as it stands."""
    assert apply_overrides({}, [f"run.dir={text}"]) == {"run": {"dir": value}}


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("strategy.seed", "override='strategy.seed' has no value; write section.key=value."),
        ("strategy=3", "strategy=3 sets a section; write strategy.key=value. Known: strategy, seed, "),
        ("seed=3", "seed=3 is not a section; did you mean 'strategy.seed' or 'data.seed'?"),
        ("=3", '""=3 is not a section; Known: '),
        ("enigne.a.b=1", "enigne is not a section; did you mean 'engine'?"),
        ("run.dri.x=1", "run.dri is not a setting of run; did you mean 'dir'?"),
        ("strategy.seed.x=1", "strategy.seed.x=1 is deeper than the setting; write strategy.seed=value."),
        ("data.task_options..x=1", 'data.task_options."".x=1 has an empty name; write a name between the dots.'),
        ("model.hidden_size=1", "model=3 is not a table; nothing can be set in it."),
        ("data.hf_token=s3cret", "data.hf_token='***' is not a setting of data; "),
    ],
)
def test_overrides_that_name_no_setting(override: str, problem: str) -> None:
    """An override that names no setting is refused, with the one that was meant and without secrets."""
    with pytest.raises(ConfigError) as caught:
        apply_overrides({"model": 3}, [override, "strategy.sed=1"])
    first, second = str(caught.value).splitlines()
    assert first.startswith(f"command line: {problem}")
    assert second.startswith("command line: strategy.sed=1 is not a setting of strategy; did you mean 'seed'?")


def test_overrides_leave_the_mapping_alone() -> None:
    """The mapping that is overridden does not change, at any depth."""
    mapping: dict[str, Any] = {"data": {"task_options": {"a": 1}}}
    assert apply_overrides(mapping, ["data.task_options.a=2"]) == {"data": {"task_options": {"a": 2}}}
    assert mapping == {"data": {"task_options": {"a": 1}}}


@pytest.mark.parametrize("kind", [Config, *sections(Config).values()])
def test_records_are_frozen(kind: type[attrs.AttrsInstance]) -> None:
    """No field of any record can be changed, and every setting is checked."""
    for field in attrs.fields(kind):
        with pytest.raises(attrs.exceptions.FrozenInstanceError):
            setattr(kind(), field.name, 1)
        assert kind is Config or field.validator is not None or field.name == "args"


def test_loading_a_config_imports_nothing_heavy() -> None:
    """Importing the configuration imports no cattrs, and reading one imports neither torch nor transformers."""
    code = (
        "import sys, lightrft.config as c; assert 'cattrs' not in sys.modules; c.load_config(None, ['run.dir=x']);"
        "c.to_toml(c.Config()); print({'torch', 'transformers', 'numpy'} & set(sys.modules), 'cattrs' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, check=False)  # noqa: S603  our own interpreter
    assert (done.stdout, done.stderr) == ("set() True\n", "")
