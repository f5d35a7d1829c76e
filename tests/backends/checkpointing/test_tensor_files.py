from __future__ import annotations

import weakref
from pathlib import Path

import attrs
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load

from lightrft.backends.checkpointing.access import WholeTensor
from lightrft.backends.checkpointing.durable import write_file
from lightrft.backends.checkpointing.tensor_files import read_tensors, reading_order, safetensors_chunks, whole_tensor
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


def described(tensors: dict[str, torch.Tensor]) -> dict[str, WholeTensor]:
    return {name: whole_tensor(tensor) for name, tensor in tensors.items()}


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
    record = write_file(path, safetensors_chunks(described(tensors), metadata={"format": "pt"}))
    assert record.size == path.stat().st_size
    back = read_tensors(path)
    assert {name: content(tensor) for name, tensor in back.items()} == {n: content(t) for n, t in tensors.items()}
    theirs = load(path.read_bytes())
    known = {name: content(tensor) for name, tensor in tensors.items() if tensor.dtype in DTYPES}
    assert {name: content(tensor) for name, tensor in theirs.items() if name in known} == known


def test_conjugate_and_negative_views_are_written_as_their_values(tmp_path: Path) -> None:
    """A lazy conjugate, and the imaginary part of one, are written as what they equal."""
    numbers = torch.tensor([1 + 2j, 3 - 4j])
    write_file(tmp_path / "f", safetensors_chunks(described({"a": numbers.conj(), "b": numbers.conj().imag})))
    back = read_tensors(tmp_path / "f")
    assert back["a"].tolist() == [1 - 2j, 3 + 4j]
    assert back["b"].tolist() == [-2.0, 4.0]


def test_a_dtype_that_torch_does_not_know_is_named(tmp_path: Path) -> None:
    """A file of a later torch is refused by the name of its dtype."""
    tensors = described({"a": torch.zeros(1, dtype=torch.complex64)})
    chunks = b"".join(bytes(chunk) for chunk in safetensors_chunks(tensors))
    (tmp_path / "f").write_bytes(chunks.replace(b"complex64", b"complex65"))
    with pytest.raises(CheckpointError, match="dtype='complex65' is unknown to torch"):
        read_tensors(tmp_path / "f")


def test_a_tensor_that_is_not_what_was_said_is_refused() -> None:
    """The header is written before the values, so a read of another shape or dtype is an error with both in words."""
    wrong = whole_tensor(torch.zeros(3), lambda: torch.zeros(2, dtype=torch.bfloat16))
    with pytest.raises(CheckpointError, match=r"a was said to be float32\[3\] and is read as bfloat16\[2\]"):
        list(safetensors_chunks({"a": wrong}))


def test_tensors_are_read_one_at_a_time() -> None:
    """While a tensor is read no other is in memory, and each is read once, in the order that is told."""
    alive: list[int] = []
    read: list[str] = []

    def whole(name: str) -> WholeTensor:
        def take() -> torch.Tensor:
            tensor = torch.zeros(100)
            read.append(name)
            held.append(weakref.ref(tensor))
            alive.append(sum(one() is not None for one in held))
            return tensor

        return attrs.evolve(whole_tensor(torch.zeros(100)), read=take)

    held: list[weakref.ref[torch.Tensor]] = []
    tensors = {name: whole(name) for name in "badc"}
    for chunk in safetensors_chunks(tensors):
        del chunk
    assert alive == [1, 1, 1, 1]
    assert read == ["a", "b", "c", "d"]
    assert [tensors[name] for name in read] == reading_order(tensors)
