"""Pickle streams of later protocols, rewritten in the instructions of protocol 2; nothing is run and nothing looked up.

torch's restricted unpickler reads protocol 2, which `torch.save` writes. The `.metadata` that
`torch.distributed.checkpoint` writes is in the protocol that Python uses by itself, which says the same in other
instructions: strings with shorter lengths, a memo that numbers itself, and names of classes that lie on the stack. What
this module does not know it refuses; what it lets through is still the restricted unpickler's to judge.
"""

from __future__ import annotations

from collections.abc import Iterator

from lightrft.errors import CheckpointError

__all__ = ["to_protocol_2"]

# instructions that both have, and how many bytes follow them
_KEPT = {
    **dict.fromkeys(b"().N]}Rabestu\x81\x85\x86\x87\x88\x89\x8f", 0),
    ord("J"): 4,
    ord("K"): 1,
    ord("M"): 2,
    ord("G"): 8,
}
_TEXTS = {ord("X"): 4, 0x8C: 1, 0x8D: 8}  # strings, and how many bytes their length has
_PUTS = {ord("q"): 1, ord("r"): 4, 0x94: 0}  # the memo takes what lies on top; the last numbers by itself
_GETS = {ord("h"): 1, ord("j"): 4}
_PROTOCOL, _FRAME, _LONG, _GLOBAL, _STACK_GLOBAL = 0x80, 0x95, 0x8A, ord("c"), 0x93
# a longer one is no name; it is pushed again wherever it is asked for, which must not make the stream grow
_NAME_SIZE = 1000


def to_protocol_2(stream: bytes, *, source: str) -> bytes:
    """Return a stream that says the same in protocol 2.

    Args:
        stream: a pickle.
        source: what it is called in the error.

    Raises:
        CheckpointError: it is cut off, or has an instruction that protocol 2 cannot say.
    """
    try:
        return b"".join(instruction for instruction, _ in _rewritten(stream))
    except (IndexError, KeyError, ValueError) as error:
        raise CheckpointError(
            f"{source} is no pickle that can be read safely ({error}); copy it again, or save it with another torch."
        ) from error


def _rewritten(stream: bytes) -> list[tuple[bytes, bytes | None]]:
    """Return the instructions, and of those that push a short string that string."""
    written: list[tuple[bytes, bytes | None]] = [(b"\x80\x02", None)]
    memo: dict[int, bytes | None] = {}
    for code, argument in _instructions(stream):
        if code in _TEXTS:
            written.append(_push(argument))
        elif code in _PUTS:
            place = int.from_bytes(argument, "little") if argument else len(memo)
            memo[place] = text = written[-1][1]
            if text is None:  # short strings are pushed again instead, because a class takes its name off the stack
                written.append((b"r" + place.to_bytes(4, "little"), None))
        elif code in _GETS:
            place = int.from_bytes(argument, "little")
            text = memo[place]
            written.append((b"j" + place.to_bytes(4, "little"), None) if text is None else _push(text))
        elif code == _STACK_GLOBAL:
            (_, name), (_, module) = written.pop(), written.pop()
            if name is None or module is None or b"\n" in name + module:
                raise ValueError("the name of a class is no string")
            written.append((b"c" + module + b"\n" + name + b"\n", None))
        else:
            written.append((bytes([code]) + argument, None))
    return written


def _instructions(stream: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield each instruction with what follows it, of strings their bytes alone."""
    position = 0

    def take(size: int) -> bytes:
        nonlocal position
        position += size
        if position > len(stream):
            raise ValueError("it is cut off")
        return stream[position - size : position]

    code = 0
    while code != ord("."):
        code = take(1)[0]
        if code in (_PROTOCOL, _FRAME):
            take(1 if code == _PROTOCOL else 8)
        elif code in _TEXTS:
            yield code, take(int.from_bytes(take(_TEXTS[code]), "little"))
        elif code == _LONG:
            size = take(1)
            yield code, size + take(size[0])
        elif code == _GLOBAL:
            end = stream.index(b"\n", stream.index(b"\n", position) + 1) + 1
            yield code, take(end - position)
        else:
            sizes = {**_KEPT, **_PUTS, **_GETS, _STACK_GLOBAL: 0}
            if code not in sizes:
                raise ValueError(f"instruction {code:#04x} is unknown")
            yield code, take(sizes[code])


def _push(text: bytes) -> tuple[bytes, bytes | None]:
    return b"X" + len(text).to_bytes(4, "little") + text, text if len(text) <= _NAME_SIZE else None
