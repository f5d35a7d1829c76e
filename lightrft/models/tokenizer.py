"""A tokenizer of single characters, and encoding that refuses what a tokenizer does not know."""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Sequence
from typing import Protocol, cast

from lightrft.errors import ConfigError, DataError
from lightrft.models.installed import require_transformers
from lightrft.strategy.protocols.checkpointing import SavesTokenizer
from lightrft.strategy.protocols.rollout import Tokenizer

__all__ = ["EOS_TOKEN", "PAD_TOKEN", "PRINTABLE_ASCII", "ModelTokenizer", "build_character_tokenizer", "encode_text"]

PRINTABLE_ASCII = string.digits + string.ascii_letters + string.punctuation + " \n"
"""The characters of a tokenizer with an empty alphabet: printable ASCII and the newline."""

PAD_TOKEN = "<pad>"  # noqa: S105 (no password: the name of a token)
"""Fills batches; id 0."""

EOS_TOKEN = "<eos>"  # noqa: S105
"""Ends a completion; id 1."""

_SHOWN = 80
"""Characters of a text that a message shows: about one line."""


class ModelTokenizer(Tokenizer, SavesTokenizer, Protocol):
    """What a run asks of a tokenizer: between text and ids, and onto the disk.

    transformers' tokenizers have all of it, though their annotations are wider; `cast` them.
    """

    @property
    def bos_token_id(self) -> int | None:
        """Id of the token that begins a text."""
        ...

    @property
    def pad_token_id(self) -> int | None:
        """Id of the token that fills batches."""
        ...

    def __len__(self) -> int:
        """Return the size of the vocabulary, special tokens included."""
        ...


def build_character_tokenizer(
    alphabet: str = "", *, words: Sequence[str] = (), lowercase: bool = False
) -> ModelTokenizer:
    """Return a tokenizer whose tokens are single characters, and the words that are given.

    Ids are those of `PAD_TOKEN` (0), `EOS_TOKEN` (1), then the characters in the order of the alphabet and the words in
    theirs. Encoding adds no special token and reads "<eos>" in a text as five characters; decoding what was encoded
    gives the same text (in lower case where `lowercase`). A character outside of the alphabet is an error and never an
    unknown token: `encode_text` names it.

    Args:
        alphabet: the characters, each once; empty takes `PRINTABLE_ASCII`.
        words: strings of two or more characters that are one token each wherever they occur, the longest first.
        lowercase: read every text in lower case.

    Raises:
        ConfigError: a character or word comes twice, a word is shorter than two characters or, with `lowercase`, not in
            lower case, or something holds half of a surrogate pair, which is no character.
        MissingPackageError: transformers is not installed.

    Example:
        >>> tokenizer = build_character_tokenizer("0123456789+")
        >>> tokenizer.encode("1+1")
        [3, 12, 3]
    """
    require_transformers()
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    characters = alphabet or PRINTABLE_ASCII
    _check_alphabet(characters)
    _check_words(words, lowercase=lowercase)
    tokens = [PAD_TOKEN, EOS_TOKEN, *characters, *words]
    # Without an unknown token WordLevel raises; byte-pair encoding would drop an unknown character silently.
    tokenizer = Tokenizer(models.WordLevel({token: index for index, token in enumerate(tokens)}))
    longest_first = sorted(words, key=len, reverse=True)
    pieces = "|".join([*map(re.escape, longest_first), r"[\s\S]"])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pieces), "isolated")
    if lowercase:
        tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.decoder = decoders.Fuse()
    # untyped __init__; its methods take and return more types than the protocol's
    build = cast("Callable[..., ModelTokenizer]", PreTrainedTokenizerFast)
    return build(
        tokenizer_object=tokenizer,
        pad_token=PAD_TOKEN,
        eos_token=EOS_TOKEN,
        clean_up_tokenization_spaces=False,
        split_special_tokens=True,
    )


def encode_text(tokenizer: Tokenizer, text: str, *, where: str) -> list[int]:
    """Return the ids of a text without special tokens, and refuse characters that the tokenizer does not know.

    Args:
        tokenizer: any tokenizer; one with an unknown token is held to the same rule.
        text: the text.
        where: what the message calls the text; the text itself will do.

    Raises:
        DataError: a character that the tokenizer does not know; it is named.

    Example:
        >>> encode_text(build_character_tokenizer("ab"), "abba", where="prompts[0]")
        [2, 3, 3, 2]
    """
    token_ids = _ids(tokenizer, text)
    if token_ids is not None and not _has_unknown(tokenizer, token_ids):
        return token_ids
    unknown = next((character for character in text if not _is_known(tokenizer, character)), None)
    if unknown is None and token_ids is not None:
        return token_ids  # the text spells the unknown token itself out
    place = where if len(where) <= _SHOWN else where[: _SHOWN - 3] + "..."
    raise DataError(
        f"{place!r} holds {unknown!r}, which the tokenizer does not know; "
        "take it out, or add it to model.alphabet if the model is built here."
    )


def _ids(tokenizer: Tokenizer, text: str) -> list[int] | None:
    """Return the ids, or None if the tokenizer refuses the text."""
    try:
        return tokenizer.encode(text, add_special_tokens=False)
    except Exception:  # noqa: BLE001 (tokenizers raises bare Exception, and TypeError for half a surrogate pair)
        return None


def _has_unknown(tokenizer: Tokenizer, token_ids: list[int]) -> bool:
    unknown_id: int | None = getattr(tokenizer, "unk_token_id", None)
    return unknown_id is not None and unknown_id in token_ids


def _is_known(tokenizer: Tokenizer, character: str) -> bool:
    token_ids = _ids(tokenizer, character)
    return token_ids is not None and not _has_unknown(tokenizer, token_ids)


def _check_alphabet(characters: str) -> None:
    seen: set[str] = set()
    for character in characters:
        if character in seen:
            raise ConfigError(f"alphabet={characters!r} has {character!r} twice; write each character once.")
        if "\ud800" <= character <= "\udfff":
            raise ConfigError(f"alphabet={characters!r} has {character!r}, half a surrogate pair; take it out.")
        seen.add(character)


def _check_words(words: Sequence[str], *, lowercase: bool) -> None:
    for index, word in enumerate(words):
        if len(word) < 2:
            raise ConfigError(f"words={word!r} is shorter than two characters; put characters into the alphabet.")
        if word in words[:index]:
            raise ConfigError(f"words={word!r} comes twice; write each word once.")
        if lowercase and word != word.lower():
            raise ConfigError(f"words={word!r} is not in lower case and lowercase=True; write {word.lower()!r}.")
        if any("\ud800" <= character <= "\udfff" for character in word):
            raise ConfigError(f"words={word!r} holds half a surrogate pair; take it out.")
