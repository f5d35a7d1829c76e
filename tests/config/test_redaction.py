from __future__ import annotations

import argparse
from collections import OrderedDict
from pathlib import Path
from typing import NamedTuple

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightrft.config import Config, DataConfig, StrategyConfig, as_mapping, to_json, to_toml
from lightrft.config._names import sections, setting_fields
from lightrft.config.redaction import HIDDEN, is_secret, redact, redacted, shown

SECRET_NAMES = [
    "HF_TOKEN",
    "hf_token",
    "HFTOKEN",
    "token",
    "hub_token",
    "hubToken",
    "GITHUB_TOKEN_2",
    "token1",
    "access_tokens",
    "hf_tokens",
    "token_value",
    "wandb_api_key",
    "WANDB_API_KEY",
    "apiKey",
    "apikey",
    "X-Api-Key",
    "openai_key",
    "private_key",
    "ssh_keys",
    "AWS_SECRET_ACCESS_KEY",
    "aws_access_key",
    "Authorization",
    "auth",
    "basic_auth",
    "bearer",
    "password",
    "db.password",
    "dbpassword",
    "passwd",
    "passphrase",
    "client_secret",
    "secrets",
    "credentials",
    "session_cookie",
    "use_wandb",
]
OPEN_NAMES = [
    "stop_token_ids",
    "max_new_tokens",
    "max_tokens",
    "num_tokens",
    "tokens_per_second",
    "tokens",
    "token_ids",
    "token_level_loss",
    "token_mean",
    "pad_token",
    "eos_token",
    "eos_token_id",
    "image_token",
    "special_tokens",
    "tokenizer",
    "tokenizer_path",
    "input_key",
    "label_key",
    "prompt_key",
    "keyboard",
    "author",
    "secretary_problem",
    "monkey",
    "seed",
    "",
]


class Login(NamedTuple):
    user: str
    password: str


@attrs.frozen
class Client:
    api_key: str


@pytest.mark.parametrize("name", SECRET_NAMES)
def test_secret_names(name: str) -> None:
    """Names that tokens, keys and passwords stand under are secret, in every spelling that is in use."""
    assert is_secret(name)


@pytest.mark.parametrize("name", OPEN_NAMES)
def test_open_names(name: str) -> None:
    """Names that speak of a model's tokens, or only look like a secret's, are not."""
    assert not is_secret(name)


def test_no_setting_of_ours_is_secret() -> None:
    """No setting with a type of its own has a secret's name, so only tables of free names need redaction."""
    names = [name for kind in sections(Config).values() for name in setting_fields(kind)]
    assert [name for name in names if is_secret(name)] == []


def test_redact_reaches_every_depth() -> None:
    """A secret is hidden in nested mappings, lists, tuples, sets and named tuples, whose types stay."""
    value = {
        "a": [{"token": "s3cret"}],
        "b": ({"x": OrderedDict(password=["s3cret"])}, 1),
        "login": Login("me", "s3cret"),
        "set": {("x", Login("me", "s3cret"))},
        "api_key": {"live": "s3cret"},
    }
    assert redact(value) == {
        "a": [{"token": HIDDEN}],
        "b": ({"x": {"password": HIDDEN}}, 1),
        "login": Login("me", HIDDEN),
        "set": {("x", Login("me", HIDDEN))},
        "api_key": HIDDEN,
    }
    assert "s3cret" not in redacted(value)


def test_redact_keeps_whether_there_is_a_secret() -> None:
    """None and bools under a secret's name are shown, for they say no more than whether there is one."""
    assert redact({"token": None, "use_wandb": True}) == {"token": None, "use_wandb": True}


@pytest.mark.parametrize("value", [argparse.Namespace(key="s3cret"), Client("s3cret")])
def test_objects_do_not_print_their_attributes(value: object) -> None:
    """An object with attributes is shown as its type, because one of them may be a secret."""
    assert redacted([value]) == f"['<{type(value).__module__}.{type(value).__qualname__}>']"


def test_plain_objects_print_as_they_are() -> None:
    """Paths and plain data keep their own representation."""
    assert redacted([Path("x"), 1.5, "text", b"raw", None]) == f"[{Path('x')!r}, 1.5, 'text', b'raw', None]"


def test_shown_is_short() -> None:
    """A value in a message is cut to a readable length and hides secrets by the name it stands under."""
    assert shown("x" * 1000) == f"'{'x' * 119}..."
    assert shown("s3cret", name="token") == "'***'"


@settings(deadline=None, max_examples=25)
@given(st.sampled_from(SECRET_NAMES), st.recursive(st.just("s3cret"), lambda inner: st.lists(inner, min_size=1)))
def test_no_output_shows_a_secret(name: str, secret: object) -> None:
    """Neither repr nor TOML nor JSON of a config holds what stands under a secret's name, at any depth."""
    extra = {"nested": [{name: secret}], name: secret}
    config = Config(strategy=StrategyConfig(extra_args=extra), data=DataConfig(task_options=extra))
    written = [repr(config), repr(config.strategy), str(config.data), to_toml(config), to_json(config)]
    assert [text for text in [*written, str(as_mapping(config))] if "s3cret" in text] == []
    assert all(HIDDEN in text for text in written)
