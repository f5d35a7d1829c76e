"""Reads checkpoints as docs/checkpoints.md describes them, with nothing of the library, torch or safetensors."""

from __future__ import annotations

import hashlib
import json
import re
import struct
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

_NAMES = "BOOL U8 I8 I16 U16 I32 U32 I64 U64 F8_E4M3 F8_E5M2 F16 BF16 F32 F64".split()  # noqa: SIM905 (one line)
DTYPES = dict(zip(_NAMES, ["?", *"u1 i1 <i2 <u2 <i4 <u4 <i8 <u8 u1 u1 <f2 <u2 <f4 <f8".split()], strict=True))  # noqa: SIM905
RAW_DTYPES = {"complex64": "<c8", "complex128": "<c16"}
BLOCK_SIZE = 33_554_432
TORCH_DTYPES = {"float32": "<f4", "float64": "<f8", "int64": "<i8"}


def newest_step(directory: Path) -> int | None:
    steps = []
    for path in directory.iterdir():
        is_named = re.fullmatch(r"step-([0-9]{8}|[1-9][0-9]{8,})", path.name) is not None
        if is_named and ((path / "manifest.json").exists() or (path / "rank-00000.random.json").exists()):
            steps.append(int(path.name[5:]))
    return max(steps, default=None)


def read_checkpoint(directory: Path, step: int | None = None) -> dict[str, Any]:
    """Return the manifest's content, and what each file holds: arrays by name, or values; refuse what is damaged."""
    step = newest_step(directory) if step is None else step
    path = directory / f"step-{step:08d}"
    content = verified_manifest(path / "manifest.json")
    assert (content["format"], content["version"], content["step"]) == ("lightrft-checkpoint", 1, step)
    found: dict[str, Any] = {"manifest": content}
    for name, record in content["files"].items():
        assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,254}", name), name
        assert (path / name).is_file(), name
        assert not (path / name).is_symlink(), name
        written = (path / name).read_bytes()
        blocks = [written[start : start + BLOCK_SIZE] for start in range(0, len(written) or 1, BLOCK_SIZE)]
        digests = "".join(hashlib.sha256(block).hexdigest() for block in blocks)
        assert (len(written), digests) == (record["size"], record["sha256"]), name
        found[name] = arrays_of(written) if name.endswith(".safetensors") else loads(written)
    found["client_state.json"] = decoded(found["client_state.json"])
    return found


def verified_manifest(path: Path) -> dict[str, Any]:
    written = path.read_bytes()
    content = loads(written)["content"]
    digest = hashlib.sha256((json.dumps(content) + "\n").encode("ascii")).hexdigest()
    assert written == (json.dumps({"content": content, "sha256": digest}, indent=2) + "\n").encode("ascii")
    return content  # type: ignore[no-any-return]


def loads(written: bytes) -> Any:
    def refuse(constant: str) -> None:
        raise ValueError(constant)

    return json.loads(written, parse_constant=refuse)


def arrays_of(written: bytes) -> dict[str, np.ndarray]:
    (length,) = struct.unpack("<Q", written[:8])
    assert length % 8 == 0
    header, data = json.loads(written[8 : 8 + length]), written[8 + length :]
    raw = json.loads(header.pop("__metadata__", {}).get("lightrft.raw", "{}"))
    arrays, end = {}, 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        assert entry["data_offsets"][0] == end  # without gaps
        start, end = entry["data_offsets"]
        dtype, shape = DTYPES[entry["dtype"]], entry["shape"]
        if name in raw:
            dtype, shape = RAW_DTYPES[raw[name]["dtype"]], raw[name]["shape"]
        array = np.frombuffer(data[start:end], dtype).reshape(shape)
        if entry["dtype"] == "BF16":  # the upper half of a float32
            array = (array.astype("<u4") << 16).view("<f4")
        arrays[name] = array
    assert end == len(data)
    return arrays


def decoded(value: Any) -> Any:
    if isinstance(value, list):
        return [decoded(item) for item in value]
    if not isinstance(value, dict) or not next(iter(value), "").startswith("$"):
        return {key: decoded(item) for key, item in value.items()} if isinstance(value, dict) else value
    ((form, body),) = value.items()
    if form == "$tensor":
        return np.frombuffer(bytes.fromhex(body["bytes"]), TORCH_DTYPES[body["dtype"]]).reshape(body["shape"])
    if form in {"$items", "$counter"}:
        pairs = {decoded(key): decoded(item) for key, item in body}
        return Counter(pairs) if form == "$counter" else pairs
    if form == "$tuple":
        return tuple(decoded(item) for item in body)
    return {"$float": float, "$int": lambda text: int(text, 16)}[form](body)
