from __future__ import annotations

import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lightrft.errors import ConfigError, DataError, MissingPackageError
from lightrft.models.tokenizer import PRINTABLE_ASCII, build_character_tokenizer, encode_text

ODD = "aß\té𝄞\u0301 '.,!?n<>|eos\u2028\x00"


@settings(deadline=None, max_examples=50)
@given(text=st.text(st.sampled_from(ODD)))
def test_decoding_what_was_encoded_gives_the_same_text(text: str) -> None:
    """Spaces, combining characters, the null character and the spelling of a special token survive a round trip."""
    tokenizer = build_character_tokenizer(ODD)
    token_ids = encode_text(tokenizer, text, where="text")
    assert len(token_ids) == len(text)
    assert tokenizer.decode(token_ids) == text
    assert tokenizer.decode([*token_ids, 1, 0], skip_special_tokens=True) == text


def test_ids_are_pad_eos_and_then_the_alphabet_in_order() -> None:
    """Pad is 0, eos is 1, the characters follow in their order, and nothing is added to a text."""
    tokenizer = build_character_tokenizer("cab")
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id, len(tokenizer)) == (0, 1, None, 5)
    assert tokenizer.encode("abc") == [3, 4, 2]


def test_empty_alphabet_means_printable_ascii_and_newline() -> None:
    """The default alphabet holds the 95 printable ASCII characters and the newline, each once."""
    assert sorted(PRINTABLE_ASCII) == ["\n", *(chr(code) for code in range(32, 127))]
    tokenizer = build_character_tokenizer("")
    assert len(tokenizer) == 98
    assert tokenizer.decode(tokenizer.encode(PRINTABLE_ASCII)) == PRINTABLE_ASCII


def test_saved_and_loaded_tokenizer_is_the_same(tmp_path: Path) -> None:
    """What was saved is loaded by transformers and still refuses unknown characters and reads "<eos>" as text."""
    tokenizer = build_character_tokenizer("abc <eos>"[:9])
    tokenizer.save_pretrained(str(tmp_path))
    for loaded in (AutoTokenizer.from_pretrained(tmp_path), PreTrainedTokenizerFast.from_pretrained(tmp_path)):
        assert loaded.encode("a <eos> b") == tokenizer.encode("a <eos> b")
        assert loaded.decode(loaded.encode("a <eos> b")) == "a <eos> b"
        assert (loaded.pad_token_id, loaded.eos_token_id, len(loaded)) == (0, 1, len(tokenizer))
        with pytest.raises(DataError, match="'x'"):
            encode_text(loaded, "abx", where="prompt")


@pytest.mark.parametrize(("text", "named"), [("abé", "'é'"), ("🙂a", "'🙂'"), ("a\ud800", r"'\\ud800'")])
def test_a_character_outside_of_the_alphabet_is_named(text: str, named: str) -> None:
    """The error names the first unknown character and the place, on one line."""
    with pytest.raises(DataError, match=f"^'line 3' holds {named}, which .*; take it out"):
        encode_text(build_character_tokenizer("ab"), text, where="line 3")


def test_a_long_place_is_shortened() -> None:
    """A place of thousands of characters does not fill the screen."""
    with pytest.raises(DataError) as caught:
        encode_text(build_character_tokenizer("a"), "b" * 5000, where="b" * 5000)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("alphabet", "said"), [("abca", "has 'a' twice; write each"), ("a\udc00", "half a surrogate pair; take")]
)
def test_an_alphabet_without_meaning_is_refused(alphabet: str, said: str) -> None:
    """A repeated character and half a surrogate pair are config errors."""
    with pytest.raises(ConfigError, match=said):
        build_character_tokenizer(alphabet)


def _with_unknown_token() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1, "b": 2}, unk_token="[UNK]"))  # noqa: S106
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")  # noqa: S106


def test_a_tokenizer_with_an_unknown_token_is_held_to_the_same_rule() -> None:
    """What such a tokenizer would replace silently is an error too, and what it knows passes."""
    tokenizer = _with_unknown_token()
    assert tokenizer.encode("ac") == [1, 0]
    assert encode_text(tokenizer, "ab", where="prompt") == [1, 2]
    with pytest.raises(DataError, match="'c'"):
        encode_text(tokenizer, "abc", where="prompt")


def test_the_spelling_of_the_unknown_token_itself_passes() -> None:
    """A text that spells the unknown token holds no unknown character when each of its characters is known."""
    tokenizer = Tokenizer(models.WordLevel({"ab": 0, "a": 1, "b": 2}, unk_token="ab"))  # noqa: S106
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="ab")  # noqa: S106
    assert encode_text(wrapped, "ab", where="prompt") == [0]


def test_missing_transformers_names_the_install_command(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without transformers the error is a MissingPackageError with the command that installs it."""
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingPackageError, match=r"package='transformers'.*pip install 'lightrft\[hf\]'"):
        build_character_tokenizer("ab")


def test_words_are_one_token_each_the_longest_first() -> None:
    """A word is one token wherever it occurs, a longer word wins, and what lies around it is characters."""
    tokenizer = build_character_tokenizer("abc ", words=("ab", "abc"))
    assert tokenizer.encode("abcab ba") == [7, 6, 5, 3, 2]
    assert tokenizer.decode([7, 6, 5, 3, 2]) == "abcab ba"
    assert len(tokenizer) == 8


@settings(deadline=None, max_examples=50)
@given(st.text(alphabet="abAB. *", max_size=20))
def test_words_change_no_text(text: str) -> None:
    """Decoding what was encoded gives the text, in lower case where asked, also with words that look like patterns."""
    plain = build_character_tokenizer("abAB. *", words=("a.", ".*", "aB"))
    assert plain.decode(plain.encode(text)) == text
    lower = build_character_tokenizer("ab. *", words=("a.", ".*"), lowercase=True)
    assert lower.decode(lower.encode(text)) == text.lower()


@pytest.mark.parametrize(
    ("words", "lowercase", "said"),
    [
        (("a",), False, "shorter than two characters"),
        (("ab", "ab"), False, "comes twice"),
        (("aB",), True, "not in lower case and lowercase=True; write 'ab'"),
        (("a\udc00",), False, "half a surrogate pair"),
    ],
)
def test_words_without_meaning_are_refused(words: tuple[str, ...], lowercase: bool, said: str) -> None:
    """Each way in which a word can be wrong has its own reason."""
    with pytest.raises(ConfigError, match=said):
        build_character_tokenizer("abB", words=words, lowercase=lowercase)


def test_words_and_case_survive_the_disk(tmp_path: Path) -> None:
    """A saved tokenizer encodes as before when transformers loads it."""
    tokenizer = build_character_tokenizer("ab ", words=("ab a",), lowercase=True)
    tokenizer.save_pretrained(str(tmp_path))
    loaded = AutoTokenizer.from_pretrained(str(tmp_path))
    assert loaded.encode("AB a b", add_special_tokens=False) == tokenizer.encode("AB a b") == [5, 4, 3]
