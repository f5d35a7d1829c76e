"""How tensors lie in a buffer: bit by bit, and what is wrong with them is refused."""

from __future__ import annotations

import pytest
import torch
from apart_tensors import TENSORS, require_same

from lightrft.backends.rollout.apart.buckets import (
    BUFFER_BYTES,
    Placed,
    extent_of,
    read_bucket,
    room_for,
    size_of,
    write_bucket,
)
from lightrft.errors import WeightSyncError


def test_tensors_of_every_kind_are_read_bit_by_bit() -> None:
    """Layouts, dtypes, empty ones and single numbers; each begins where every dtype may, and none lies in another."""
    buffer = torch.zeros(size_of(TENSORS), dtype=torch.uint8)
    bucket = write_bucket(buffer, TENSORS)
    require_same(read_bucket(buffer, bucket), TENSORS)
    assert all(one.offset % 64 == 0 for one in bucket)
    assert extent_of(bucket) == bucket[-1].offset + 24
    assert extent_of(()) == 0


def test_one_changed_byte_is_refused_by_the_name_of_its_tensor() -> None:
    """Tensors before it are read, and it is not."""
    tensors = [("first", torch.randn(9)), ("second", torch.randn(9))]
    buffer = torch.zeros(size_of(tensors), dtype=torch.uint8)
    bucket = write_bucket(buffer, tensors)
    buffer[bucket[1].offset + 35] ^= 1
    stream = read_bucket(buffer, bucket)
    assert next(stream)[0] == "first"
    with pytest.raises(WeightSyncError, match=r"tensor='second' arrived with other bytes than were sent"):
        next(stream)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused_by_the_name_of_its_tensor(value: float) -> None:
    """Wherever it stands in a tensor of several pieces; a sum that is too large for the dtype is no reason."""
    large = torch.full((2**19 + 3,), 3e38)
    wrong = torch.zeros(2**19 + 3)
    wrong[-1] = value
    buffer = torch.zeros(size_of([("large", large), ("wrong", wrong)]), dtype=torch.uint8)
    bucket = write_bucket(buffer, [("large", large)], finite=True)
    assert torch.equal(dict(read_bucket(buffer, bucket))["large"], large)
    with pytest.raises(WeightSyncError, match=r"tensor='wrong' holds values that are not finite; look at the tr"):
        write_bucket(buffer, [("large", large), ("wrong", wrong)], finite=True)


def test_a_dtype_that_torch_has_not_is_refused() -> None:
    """A message cannot make anything else of torch out of a name."""
    placed = Placed(name="w", dtype="Tensor", shape=(1,), offset=0, digest=0)
    with pytest.raises(WeightSyncError, match="dtype='Tensor' is none of torch's"):
        next(read_bucket(torch.zeros(64, dtype=torch.uint8), [placed]))


@pytest.mark.parametrize(
    ("numbers", "room"),
    [(0, 1), (1, 128), (100, 512), (BUFFER_BYTES // 4, BUFFER_BYTES), (BUFFER_BYTES // 2, 2 * BUFFER_BYTES)],
)
def test_a_buffer_has_room_for_larger_buckets_and_no_more_than_it_should(numbers: int, room: int) -> None:
    """A small model takes little; a tensor that is larger than a buffer has one of its size."""
    assert room_for([("w", torch.empty(numbers, device="meta"))]) == room
