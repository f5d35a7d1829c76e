from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load

from lightrft.backends.checkpointing.durable import write_file
from lightrft.backends.checkpointing.stored import open_tensors, read_stored
from lightrft.backends.checkpointing.tensor_files import bytes_of, safetensors_chunks, writing_order
from lightrft.errors import CheckpointError

DTYPES = [
    torch.bool,
    *(torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32, torch.uint32, torch.int64, torch.uint64),
    *(torch.float8_e4m3fn, torch.float8_e5m2, torch.float16, torch.bfloat16, torch.float32, torch.float64),
]
RAW_DTYPES = [torch.complex64, torch.complex128, torch.float8_e4m3fnuz, torch.float8_e8m0fnu]


def make(dtype: torch.dtype, shape: list[int], seed: int) -> torch.Tensor:
    """Random bytes, seen as numbers: NaN payloads, infinities and subnormals among them."""
    generator = torch.Generator().manual_seed(seed)
    count = int(torch.tensor(shape).prod()) * torch.empty(0, dtype=dtype).element_size() if shape else 1
    size = count if shape else torch.empty(0, dtype=dtype).element_size()
    high = 2 if dtype == torch.bool else 256
    return torch.randint(high, (size,), dtype=torch.uint8, generator=generator).view(dtype).reshape(shape)


def chunks_of(tensors: dict[str, torch.Tensor], **metadata: str) -> Iterator[memoryview | bytes]:
    pieces = (bytes_of(tensors[name]) for name in writing_order(tensors))
    return safetensors_chunks(tensors, pieces, metadata=metadata)


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    with open_tensors(path) as tensors:
        return {name: read_stored(tensor) for name, tensor in tensors.items()}


def content(tensor: torch.Tensor) -> tuple[torch.dtype, torch.Size, bytes]:
    return tensor.dtype, tensor.shape, bytes(tensor.contiguous().reshape(-1).view(torch.uint8).tolist())


@given(
    st.lists(st.tuples(st.sampled_from([*DTYPES, *RAW_DTYPES]), st.lists(st.integers(0, 3), max_size=3)), max_size=6),
    st.integers(0, 99),
)
@settings(deadline=None, max_examples=50)
def test_any_tensor_comes_back_bit_for_bit(
    tmp_path_factory: pytest.TempPathFactory, made: list[object], seed: int
) -> None:
    """Tensors of every dtype and shape, turned ones and views too, come back bit for bit.

    safetensors' own reader, another implementation, reads the same of those dtypes that it knows.
    """
    tensors = {f"tensor {index}": make(*item, seed + index) for index, item in enumerate(made)}  # type: ignore[misc]
    tensors |= {f"{name} turned": tensor.movedim(0, -1) for name, tensor in tensors.items() if tensor.dim() > 1}
    path = tmp_path_factory.mktemp("tensors") / "file.safetensors"
    record = write_file(path, chunks_of(tensors, format="pt"))
    assert record.size == path.stat().st_size
    back = read_tensors(path)
    assert {name: content(tensor) for name, tensor in back.items()} == {n: content(t) for n, t in tensors.items()}
    theirs = load(path.read_bytes())
    known = {name: content(tensor) for name, tensor in tensors.items() if tensor.dtype in DTYPES}
    assert {name: content(tensor) for name, tensor in theirs.items() if name in known} == known


def test_conjugate_and_negative_views_are_written_as_their_values(tmp_path: Path) -> None:
    """A lazy conjugate, and the imaginary part of one, are written as what they equal."""
    numbers = torch.tensor([1 + 2j, 3 - 4j])
    write_file(tmp_path / "f", chunks_of({"a": numbers.conj(), "b": numbers.conj().imag}))
    back = read_tensors(tmp_path / "f")
    assert back["a"].tolist() == [1 - 2j, 3 + 4j]
    assert back["b"].tolist() == [-2.0, 4.0]


def test_a_dtype_that_torch_does_not_know_is_named(tmp_path: Path) -> None:
    """A file of a later torch is refused by the name of its dtype."""
    chunks = b"".join(bytes(chunk) for chunk in chunks_of({"a": torch.zeros(1, dtype=torch.complex64)}))
    (tmp_path / "f").write_bytes(chunks.replace(b"complex64", b"complex65"))
    with pytest.raises(CheckpointError, match="dtype='complex65' is unknown to torch"):
        read_tensors(tmp_path / "f")


def test_pieces_are_cut_anywhere_and_taken_as_they_are_needed() -> None:
    """A file takes the pieces of its own tensors, whatever their sizes, and leaves those of the next file."""
    tensors = {"a": torch.arange(5.0), "b": torch.zeros(0), "c": torch.tensor(True)}
    whole = b"".join(bytes(chunk) for chunk in chunks_of(tensors))
    flat = bytes_of(tensors["a"])
    pieces = iter([flat[:3], flat[3:3], flat[3:], bytes_of(tensors["c"]), torch.zeros(9, dtype=torch.uint8)])
    assert b"".join(bytes(chunk) for chunk in safetensors_chunks(tensors, pieces)) == whole
    assert [len(piece) for piece in pieces] == [9]


def test_pieces_that_are_longer_than_what_was_said_are_refused() -> None:
    """The header is written before the values, so bytes beyond what it says are an error that names the tensor."""
    with pytest.raises(CheckpointError, match="a has 4 bytes more than was said"):
        list(safetensors_chunks({"a": torch.zeros(3)}, [bytes_of(torch.zeros(4))]))
