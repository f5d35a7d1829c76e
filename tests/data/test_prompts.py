from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightrft.data.prompts import Problem, load_json_lines, render
from lightrft.errors import DataError

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | TEXT,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(TEXT, inner, max_size=2),
    max_leaves=3,
)


def _write(directory: Path, content: str | bytes) -> str:
    path = directory / "prompts.jsonl"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


@settings(deadline=None, max_examples=30)
@given(
    rows=st.lists(st.tuples(TEXT.filter(bool), TEXT, st.dictionaries(TEXT, JSON, max_size=2)), min_size=1, max_size=4),
    escape=st.booleans(),
    end=st.sampled_from(["\n", "\r\n", "\n\n \n"]),
    mark=st.sampled_from([b"", b"\xef\xbb\xbf"]),
)
def test_what_json_wrote_comes_back(
    tmp_path_factory: pytest.TempPathFactory,
    rows: list[tuple[str, str, dict[str, object]]],
    escape: bool,
    end: str,
    mark: bytes,
) -> None:
    """Any text survives, Unicode line separators too; further keys are metadata; blank lines are nothing."""
    records = [{**rest, "prompt": prompt, "answer": answer} for prompt, answer, rest in rows]
    content = end.join(json.dumps(record, ensure_ascii=escape) for record in records)
    path = _write(tmp_path_factory.mktemp("prompts"), mark + content.encode())
    loaded = load_json_lines(path)
    assert loaded.problems == tuple(
        Problem(
            question=record["prompt"],
            answer=record["answer"],
            metadata={key: value for key, value in record.items() if key not in {"prompt", "answer"}},
        )
        for record in records
    )
    assert (loaded.name, loaded.score) == (path, None)


GOOD = '{"prompt": "1+1=", "answer": "2"}'


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "is empty; write one JSON object a line"),
        ("\n \r\n", "is empty"),
        (f"{GOOD}\n\n{{\n{GOOD}", r"line 3 is not JSON \(Expecting"),
        (f"{GOOD} {GOOD}", "line 1 is not JSON"),
        (f"{GOOD}\n[1]", r"line 2 is \[1\], not an object"),
        (f'{GOOD}\n{{"prompt": "x", "anwser": "2"}}', r"line 2 has no 'answer', only \['anwser', 'prompt'\]; add it"),
        ('{"answer": "2"}', "line 1 has no 'prompt'"),
        ('{"prompt": 3, "answer": "2"}', "line 1 has prompt=3, which is not a string; put it in quotes"),
        ('{"prompt": "x", "answer": null}', "line 1 has answer=None, which is not a string"),
        ('{"prompt": "", "answer": "2"}', "line 1 has an empty prompt"),
        ('{"prompt": "x", "answer": "\\ud800"}', "line 1 has half a surrogate pair in its answer"),
        ('{"prompt": "x", "answer": "y", "weight": NaN}', "line 1 is not JSON .NaN is no JSON number"),
        ('{"prompt": "x", "answer": "y", "n": ' + "9" * 5000 + "}", "line 1 is not JSON"),
        ("[" * 200_000, "line 1 is not JSON"),
        (json.dumps({"prompt": ["y" * 500], "answer": ""}), "line 1 has prompt=.{60}[.]{3}, which"),
        (GOOD.encode() + b"\n\xff\xfe", r"line 2 is not UTF-8 \(byte 1\)"),
        (GOOD.encode("utf-16"), "line 1 is not UTF-8"),
    ],
)
def test_a_file_that_cannot_be_used_says_where(tmp_path: Path, content: str | bytes, said: str) -> None:
    """Each kind of broken file is one DataError on one line, with the number of the line as an editor counts it."""
    path = _write(tmp_path, content)
    with pytest.raises(DataError, match=said) as caught:
        load_json_lines(path)
    assert path in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["none.jsonl", "", "a\0b"])
def test_a_file_that_is_not_there_is_named(tmp_path: Path, name: str) -> None:
    """A missing file, a directory and a name that no file can have are data errors."""
    with pytest.raises(DataError, match=r"cannot be read .*; give a JSON Lines file"):
        load_json_lines(f"{tmp_path}/{name}")


def test_the_template_is_applied_and_other_braces_stay(tmp_path: Path) -> None:
    """A prompt is the template with the problem in it; braces in either mean themselves."""
    assert render("{x} {question}!", "{question} {y}") == "{x} {question} {y}!"
    assert load_json_lines(_write(tmp_path, GOOD), template="Q: {question}").problems[0].question == "Q: 1+1="
