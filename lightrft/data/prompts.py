"""Problems, and problems from JSON Lines files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn, Protocol, cast

import attrs

from lightrft.errors import DataError
from lightrft.strategy.protocols.checkpointing import Json

__all__ = ["Problem", "ProblemSet", "ScoreAnswer", "load_json_lines", "render"]

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_SHOWN = 60
"""Characters of a value that a message shows, so that it stays on about one line."""


@attrs.frozen(kw_only=True)
class Problem:
    """Something to be answered.

    Attributes:
        question: the prompt as the model reads it, template included.
        answer: the reference answer; empty where a verifier needs none.
        metadata: what else the source says about it.
    """

    question: str
    answer: str
    metadata: Mapping[str, Json] = attrs.field(factory=dict[str, Json])


class ScoreAnswer(Protocol):
    """The verifier of a source of problems."""

    def __call__(self, prompt: str, completion: str, answer: str) -> float:
        """Return the score of a completion, 1 for a right one.

        Args:
            prompt: the question of a problem of the set.
            completion: what the model answered.
            answer: the problem's reference answer.
        """
        ...


@attrs.frozen(kw_only=True, eq=False)
class ProblemSet:
    """Problems of one source.

    Attributes:
        name: of the source: a task or a file.
        problems: in order.
        score: the source's own verifier; None for a file, which has none.
    """

    name: str
    problems: tuple[Problem, ...]
    score: ScoreAnswer | None


def render(template: str, question: str) -> str:
    """Return the prompt that a question becomes; different questions become different prompts.

    Args:
        template: text with `{question}` in it; other braces mean themselves.
        question: the question.

    Example:
        >>> render("Q: {question} A:", "1+1")
        'Q: 1+1 A:'
    """
    return template.replace("{question}", question)


def load_json_lines(path: str, *, template: str = "{question}") -> ProblemSet:
    r"""Return the problems of a file with one JSON object a line: `{"prompt": "1+1=", "answer": "2"}`.

    Further keys become metadata. Blank lines are left out, and so is a byte-order mark at the beginning.

    Args:
        path: UTF-8 file, lines ended by "\n" or "\r\n".
        template: how the value of "prompt" becomes a prompt.

    Raises:
        DataError: the file cannot be read or is empty, or a line is not what it should be; its number is named.
    """
    lines = enumerate(_read(path).split(b"\n"), start=1)
    problems = tuple(_parse(path, number, line, template) for number, line in lines if line.strip())
    if not problems:
        raise DataError(f"path={path!r} is empty; write one JSON object a line, with a prompt and an answer.")
    return ProblemSet(name=path, problems=problems, score=None)


def _read(path: str) -> bytes:
    try:
        content = Path(path).read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a null character in the path
        reason = getattr(error, "strerror", None) or str(error)
        raise DataError(f"path={path!r} cannot be read ({reason}); give a JSON Lines file.") from error
    return content.removeprefix(_BYTE_ORDER_MARK)


def _parse(path: str, number: int, line: bytes, template: str) -> Problem:
    where = f"path={path!r} line {number}"
    try:
        record = cast("object", json.loads(line.decode("utf-8"), parse_constant=_refuse_constant))
    except UnicodeDecodeError as error:
        raise DataError(f"{where} is not UTF-8 (byte {error.start + 1}); convert the file.") from error
    except (ValueError, RecursionError) as error:  # broken JSON, numbers of thousands of digits, endless nesting
        raise DataError(f"{where} is not JSON ({error}); write one object a line.") from error
    if not isinstance(record, dict):
        raise DataError(f"{where} is {_shown(record)}, not an object; write one object a line.")
    fields = cast("dict[str, Json]", record)
    question = _text(fields, "prompt", where)
    if not question:
        raise DataError(f"{where} has an empty prompt; write the problem, or remove the line.")
    answer = _text(fields, "answer", where)
    rest = {key: value for key, value in fields.items() if key not in {"prompt", "answer"}}
    return Problem(question=render(template, question), answer=answer, metadata=rest)


def _text(fields: Mapping[str, Json], key: str, where: str) -> str:
    if key not in fields:
        raise DataError(f"{where} has no {key!r}, only {_shown(sorted(fields))}; add it.")
    value = fields[key]
    if not isinstance(value, str):
        raise DataError(f"{where} has {key}={_shown(value)}, which is not a string; put it in quotes.")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{where} has half a surrogate pair in its {key}; write the whole character.") from error
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "..."
