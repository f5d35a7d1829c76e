"""Reads thousands of forged checkpoints, and tells what the interpreter was asked to import or to run meanwhile.

Run by test_forged.py as `fuzz_program.py DIRECTORY COUNT`; writes result.json there. An audit hook stays for as long as
its process lives, which is why this is one of its own.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import shutil
import sys
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch

from lightrft.backends.checkpointing.foreign.opening import open_foreign
from lightrft.errors import LightRFTError

WATCHED = (
    "import",
    "exec",
    "compile",
    "pickle.find_class",
    "os.",
    "subprocess.",
    "socket.",
    "shutil.",
    "ctypes.dlopen",
)
# looking at directories is what reading one consists of
UNWATCHED = ("os.listdir", "os.scandir", "os.walk", "os.fwalk")

CALLABLES = (
    (b"os", b"system"),
    (b"posix", b"system"),
    (b"builtins", b"exec"),
    (b"__builtin__", b"eval"),
    (b"subprocess", b"check_output"),
    (b"importlib", b"import_module"),
    (b"torch", b"load"),
    (b"torch.hub", b"load"),
    (b"torch.distributed.checkpoint.metadata", b"Metadata.__init__"),
    (b"torch.distributed.device_mesh", b"DeviceMesh"),
    (b"torch.serialization", b"add_safe_globals"),
    (b"deepspeed.runtime.config", b"DeepSpeedConfig"),
    (b"antigravity", b"fly"),
)


def forged(stream: bytes, effect: Path, rng: random.Random) -> bytes:
    """A pickle with bytes changed, a call put into it or in its place, or names of other things in place of its own."""
    module, name = rng.choice(CALLABLES)
    argument = f"touch {effect}".encode()
    text = b"X" + len(argument).to_bytes(4, "little") + argument
    call = b"c" + module + b"\n" + name + b"\n" + text + b"\x85R"
    newer = b"".join(b"\x8c" + bytes([len(part)]) + part for part in (module, name)) + b"\x93" + text + b"\x85R"
    place = rng.randrange(2, len(stream))
    kind = rng.randrange(6)
    if kind == 0:
        changed = bytearray(stream)
        for _ in range(rng.randrange(1, 4)):
            changed[rng.randrange(len(changed))] = rng.randrange(256)
        return bytes(changed)
    if kind == 1:
        return stream[:place] + stream[place + rng.randrange(1, 20) :]
    if kind == 2:
        return stream[:place] + rng.choice((call, newer)) + stream[place:]
    if kind == 3:
        return stream[:2] + rng.choice((call, newer)) + b"."
    if kind == 4:
        known = [
            part for part in (b"MetadataIndex", b"Metadata", b"Size", b"OrderedDict", b"LossScaler") if part in stream
        ]
        return stream.replace(rng.choice(known), name) if known else call + b"."
    return stream[:-1] + rng.choice((call, newer)) + b"."


def put(path: Path, change: Callable[[bytes], bytes]) -> None:
    """Change the pickle of a file: of `.metadata` all of it, of a file of `torch.save` the one inside."""
    content = path.read_bytes()
    if not content.startswith(b"PK"):
        path.write_bytes(change(content))
        return
    written = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as archive, zipfile.ZipFile(written, "w") as other:
        for member in archive.namelist():
            inner = archive.read(member)
            other.writestr(member, change(inner) if member.endswith("data.pkl") else inner)
    path.write_bytes(written.getvalue())


def read(directory: Path) -> str:
    """Read everything that a checkpoint holds, and return how it ended."""
    try:
        with open_foreign(directory, name="actor") as found:
            for tensor in found.tensors.values():
                tensor.read()
            for state in () if found.optimizer is None else found.optimizer.parameters.values():
                for tensor in state.tensors.values():
                    tensor.read()
    except LightRFTError:
        return "refused"
    except MemoryError:
        return "too large"
    return "read"


def main(directory: Path, count: int) -> None:
    targets = {
        "dcp-nested": ".metadata",
        "zero1": "global_step2/zero_pp_rank_0_mp_rank_00_optim_states.pt",
        "zero3": "global_step2/zero_pp_rank_0_mp_rank_00_model_states.pt",
    }
    rng = random.Random(0)  # noqa: S311 (no secret)
    ends: Counter[str] = Counter()
    errors: list[str] = []
    seen: list[str] = []
    effect = directory / "effect"
    for name, target in targets.items():  # what is imported by the first use is not asked for by a file
        shutil.rmtree(directory / f"forged-{name}", ignore_errors=True)
        shutil.copytree(directory / name, directory / f"forged-{name}")
        assert read(directory / name) == "read"
        put(directory / f"forged-{name}" / target, lambda stream: stream[:-9])
        assert read(directory / f"forged-{name}") == "refused"
    repr(torch.ones(1))  # torch's errors show tensors, and to show one it imports more of itself
    is_watching = False

    def watch(event: str, args: tuple[object, ...]) -> None:
        if is_watching and event.startswith(WATCHED) and event not in UNWATCHED:
            seen.append(f"{event} {args[:2]!r}"[:200])

    sys.addaudithook(watch)
    for number in range(count):
        name = [*targets][number % len(targets)]
        path = directory / f"forged-{name}" / targets[name]
        shutil.copyfile(directory / name / targets[name], path)
        put(path, lambda stream: forged(stream, effect, rng))
        is_watching = True
        try:
            ends[read(directory / f"forged-{name}")] += 1
        except Exception as error:  # noqa: BLE001 (it is reported)
            errors.append(f"{name} {number}: {error!r}"[:500])
        is_watching = False
    num_seen = len(seen)
    is_watching = True
    pickle.loads(b"cposixpath\njoin\n(S'a'\ntR.")  # noqa: S301 (harmless: that the hook sees what pickle does)
    result = {"ends": dict(ends), "errors": errors, "seen": seen[:num_seen], "control": seen[num_seen:]}
    result["effect"] = os.path.lexists(effect)
    (directory / "result.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
