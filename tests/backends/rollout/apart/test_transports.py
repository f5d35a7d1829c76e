"""Every transport, both of its ends in this process: what arrives, what is refused, and what is left."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import attrs
import psutil
import pytest
import torch
import torch.distributed as dist
from apart_tensors import TENSORS, require_same

from lightrft.backends.rollout.apart import collective, memory
from lightrft.backends.rollout.apart.buckets import Bucket, Placed, write_bucket
from lightrft.backends.rollout.apart.transport import Line, Receiver, Sender
from lightrft.backends.rollout.apart.transports import TRANSPORTS
from lightrft.config.sections import TRANSPORT_NAMES
from lightrft.errors import EngineCrashError, WeightSyncError

PATIENCE = 120.0
CPU = torch.device("cpu")
Read = list[tuple[str, torch.Tensor]]


@attrs.frozen(kw_only=True, eq=False)
class Ends:
    """Both ends of a transport; a thread is the engine's process."""

    sender: Sender
    receiver: Receiver
    told: queue.Queue[tuple[Bucket, list[int]] | None] = attrs.field(factory=queue.Queue)
    answers: queue.Queue[Read | Exception] = attrs.field(factory=queue.Queue)


@pytest.fixture(params=TRANSPORT_NAMES)
def ends(request: pytest.FixtureRequest) -> Iterator[Ends]:
    """Yield both ends; afterwards no port, memory or thread is left of them."""
    list(used_once(request.param))  # torch makes a pipe for the whole process with its first store
    before = held()
    yield from used_once(request.param)
    assert held() - before == set()
    assert not dist.is_initialized()


def used_once(name: str) -> Iterator[Ends]:
    transport = TRANSPORTS[name]
    ends = Ends(
        sender=transport.open_sender(device=CPU, timeout=PATIENCE),
        receiver=transport.open_receiver(device=CPU, timeout=PATIENCE),
    )
    thread = threading.Thread(target=serve, args=(ends,))
    thread.start()
    try:
        send(ends, 0, [("first", torch.ones(2))])
        answer(ends)
        yield ends
    finally:
        ends.told.put(None)
        thread.join()
        ends.sender.free()
        ends.receiver.free()


def serve(ends: Ends) -> None:
    while (told := ends.told.get()) is not None:
        try:
            ends.answers.put([(name, tensor.clone()) for name, tensor in ends.receiver.receive(*told)])
        except Exception as error:  # noqa: BLE001 (the test looks at it)
            ends.answers.put(error)


def send(
    ends: Ends, slot: int, tensors: Sequence[tuple[str, torch.Tensor]], *, finite: bool = False
) -> tuple[Placed, ...]:
    def tell(bucket: Bucket, *files: int) -> None:
        ends.told.put((bucket, [os.dup(file) for file in files]))

    def await_until(is_done: Callable[[], bool]) -> bool:
        while ends.answers.empty():
            if is_done():
                return True
        return False

    return ends.sender.send(slot, tensors, Line(tell=tell, await_until=await_until), finite=finite)


def answer(ends: Ends) -> Read:
    """Return what the engine's process has read, or raise what it raised."""
    found = ends.answers.get(timeout=PATIENCE)
    if isinstance(found, Exception):
        raise found
    return found


def held() -> set[str]:
    """Return descriptors, shared memory and threads of this process."""
    files: set[str] = set()
    for file in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # that of the listing itself
            files.add(str(file.readlink()))
    maps = {line for line in Path("/proc/self/maps").read_text().splitlines() if "/memfd:lightrft" in line}
    ports = {f"port {one.laddr.port}" for one in psutil.Process().net_connections()}
    kinds = ("socket:", "pipe:", "/memfd:", "anon_inode:")
    return {file for file in files if file.startswith(kinds)} | maps | ports | {t.name for t in threading.enumerate()}


def test_tensors_of_every_kind_arrive_bit_by_bit(ends: Ends) -> None:
    """Two buckets are on their way at once; the next ones are larger and smaller, and one holds nothing."""
    buckets = [TENSORS, [("large", torch.randn(70_000))], [("void", torch.empty(0))], TENSORS[::-1], []]
    for number, bucket in enumerate(buckets):
        if number >= 2:
            require_same(answer(ends), buckets[number - 2])
        placed = send(ends, number % 2, bucket)
        assert [one.name for one in placed] == [name for name, _ in bucket]
    for bucket in buckets[-2:]:
        require_same(answer(ends), bucket)


def test_what_was_sent_may_change_at_once(ends: Ends) -> None:
    """A trainer lets go of a bucket before the engine has read it."""
    weights = torch.randn(50_000)
    sent = [("weights", weights.clone())]
    send(ends, 0, [("weights", weights)])
    weights.zero_()
    require_same(answer(ends), sent)


def test_one_changed_byte_is_refused_by_the_name_of_its_tensor(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    """Something else writes to the buffer after the digest was taken; the bucket after it arrives."""

    def write_and_damage(
        buffer: torch.Tensor, tensors: Sequence[tuple[str, torch.Tensor]], *, finite: bool
    ) -> tuple[Placed, ...]:
        placed = write_bucket(buffer, tensors, finite=finite)
        buffer[placed[1].offset + 3] ^= 1
        return placed

    for module in (memory, collective):
        monkeypatch.setattr(module, "write_bucket", write_and_damage)
    send(ends, 0, [("first", torch.randn(9)), ("second", torch.randn(9))])
    monkeypatch.undo()
    with pytest.raises(WeightSyncError, match="tensor='second' arrived with other bytes than were sent; sync again"):
        answer(ends)
    send(ends, 1, TENSORS)
    require_same(answer(ends), TENSORS)


def test_a_bucket_that_is_refused_before_it_goes_costs_nothing(ends: Ends) -> None:
    """Nobody was told of it: what comes next is as if it had not been, in a buffer that was used before or was not."""
    for slot in (0, 1):
        with pytest.raises(WeightSyncError, match="tensor='special' holds values that are not finite"):
            send(ends, slot, TENSORS, finite=True)
        send(ends, slot, TENSORS)
        require_same(answer(ends), TENSORS)


@pytest.mark.parametrize("is_known", [False, True])
def test_a_sender_that_was_freed_begins_anew(ends: Ends, *, is_known: bool) -> None:
    """The other end was freed, too, as where an engine sleeps, or was not; twice is as once."""
    for _ in range(2):
        ends.sender.free()
        if is_known:
            ends.receiver.free()
    for slot in (0, 1, 0):
        send(ends, slot, TENSORS)
        require_same(answer(ends), TENSORS)


def test_ends_of_several_ranks_do_not_meet(ends: Ends, request: pytest.FixtureRequest) -> None:
    """Each rank of a trainer has an engine of its own."""
    name = request.node.callspec.params["ends"]
    for other in used_once(name):
        send(ends, 1, TENSORS)
        send(other, 1, TENSORS[:1])
        require_same(answer(other), TENSORS[:1])
        require_same(answer(ends), TENSORS)


@pytest.mark.parametrize("ends", ["collective"], indirect=True)
def test_an_engine_that_leaves_the_group_ends_the_wait_of_the_trainer(ends: Ends) -> None:
    """What it answers says why; a new group is made of them once the trainer's end was freed, too."""
    ends.receiver.free()
    send(ends, 1, [("weights", torch.randn(9_000_000))])  # more than sockets hold
    with pytest.raises(WeightSyncError, match="the engine has left the group in which weights are sent; sync again"):
        answer(ends)
    ends.sender.free()
    send(ends, 0, TENSORS)
    require_same(answer(ends), TENSORS)


@pytest.mark.parametrize("ends", ["collective"], indirect=True)
def test_an_engine_that_ends_before_it_joins_is_a_crash(ends: Ends) -> None:
    """What noticed that is raised as it is; another process is joined by a new group."""

    def tell(bucket: Bucket, *files: int) -> None:
        del bucket, files

    def await_until(is_done: Callable[[], bool]) -> bool:
        del is_done
        raise EngineCrashError("it has ended.")

    ends.sender.free()
    with pytest.raises(EngineCrashError, match="it has ended"):
        ends.sender.send(0, TENSORS, Line(tell=tell, await_until=await_until), finite=False)
    ends.sender.free()
    send(ends, 0, TENSORS)
    require_same(answer(ends), TENSORS)


@pytest.mark.parametrize("ends", ["collective"], indirect=True)
def test_an_engine_that_cannot_join_answers_so(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trainer does not wait for one that will not come."""
    ends.sender.free()

    def no_store(*args: object) -> None:
        del args
        raise RuntimeError("[socket.cpp:1] no route to the store")

    monkeypatch.setattr(collective, "_join", no_store)
    send(ends, 0, TENSORS)
    monkeypatch.undo()
    with pytest.raises(WeightSyncError, match=r"did not arrive by engine.transport='collective' \(no route to the sto"):
        answer(ends)
    ends.sender.free()
    send(ends, 1, TENSORS)
    require_same(answer(ends), TENSORS)


def test_a_process_group_of_the_trainer_is_left_alone(ends: Ends) -> None:
    """One that is there before stays what it was; none is made."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        group = dist.group.WORLD
        ends.sender.free()
        send(ends, 0, TENSORS)
        require_same(answer(ends), TENSORS)
        ends.sender.free()
        assert dist.group.WORLD is group
        total = torch.ones(1)
        dist.all_reduce(total)
        assert total.item() == 1
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("ends", ["collective"], indirect=True)
def test_a_group_is_on_the_loopback_alone(ends: Ends) -> None:
    """Nobody on another machine can join; the system chose the ports."""
    del ends
    listening = [one.laddr.ip for one in psutil.Process().net_connections() if one.status == psutil.CONN_LISTEN]
    assert set(listening) == {"127.0.0.1"}


@pytest.mark.parametrize("ends", ["collective"], indirect=True)
def test_no_port_is_an_error_in_words(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without its own address."""
    ends.sender.free()
    monkeypatch.setattr(collective, "_HOST", "192.0.2.1")  # of no machine
    with pytest.raises(
        WeightSyncError, match=r"engine.transport='collective' has no port on 192.0.2.1 \(Cannot assign"
    ):
        send(ends, 0, TENSORS)
    assert ends.told.empty()


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="NCCL joins two GPUs, and this machine has fewer")
def test_tensors_go_from_one_gpu_to_another() -> None:
    """By NCCL, with the same two ends."""
    transport = TRANSPORTS["collective"]
    ends = Ends(
        sender=transport.open_sender(device=torch.device("cuda:0"), timeout=PATIENCE),
        receiver=transport.open_receiver(device=torch.device("cuda:1"), timeout=PATIENCE),
    )
    thread = threading.Thread(target=serve, args=(ends,))
    thread.start()
    for slot in (0, 1, 0):
        send(ends, slot, TENSORS)
        read = answer(ends)
        assert {tensor.device for _, tensor in read} == {torch.device("cuda:1")}
        require_same([(name, tensor.cpu()) for name, tensor in read], TENSORS)
    ends.told.put(None)
    thread.join()
    ends.sender.free()
    ends.receiver.free()


def test_all_transports_have_the_names_of_the_setting() -> None:
    """The configuration is checked without importing them."""
    assert tuple(TRANSPORTS) == TRANSPORT_NAMES
