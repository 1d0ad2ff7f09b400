"""Memory of large activations on CPU: kept when they die, never shared while they live."""

from __future__ import annotations

import gc
import os
import random
import threading

import needs
import pytest
import torch

import resfast
from resfast.backends.interface import empty_nhwc

pytestmark = needs.native_library
ops = torch.ops.resfast
MIB = 2**20
LIKE = torch.empty(0)


@pytest.fixture(autouse=True)
def _nothing_kept():
    gc.collect()  # other tests' models in cycles, and the activations they hold
    resfast.clear_caches()
    yield
    resfast.clear_caches()


def take(mib: float, like: torch.Tensor = LIKE) -> torch.Tensor:
    """A tensor of so many MiB."""
    return empty_nhwc((1, int(mib * MIB / like.element_size()), 1, 1), like)


def span(t: torch.Tensor) -> range:
    return range(t.data_ptr(), t.data_ptr() + t.numel() * t.element_size())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_tensor_is_dense_channels_last(dtype):
    t = empty_nhwc((3, 64, 65, 67), torch.empty(0, dtype=dtype))
    plain = torch.empty(3, 64, 65, 67, dtype=dtype, memory_format=torch.channels_last)
    assert (t.shape, t.stride(), t.dtype) == (plain.shape, plain.stride(), dtype)
    assert t.untyped_storage().nbytes() == plain.untyped_storage().nbytes()
    assert t.data_ptr() % 64 == 0
    assert not t.requires_grad


def test_memory_is_kept_and_used_again():
    first = take(8)
    place = first.data_ptr()
    del first
    second = take(7)  # of about that size
    assert second.data_ptr() == place
    other = take(7)
    assert other.data_ptr() != place
    assert ops.release_kept() == 0
    del second
    assert ops.release_kept() == 8 * MIB


def test_a_much_smaller_tensor_does_not_take_it():
    large = take(8)
    place = large.data_ptr()
    del large
    assert take(4).data_ptr() != place


def test_the_nearest_size_is_taken():
    tensors = [take(size) for size in (10, 8, 9)]
    place = tensors[1].data_ptr()
    tensors.clear()
    assert take(8).data_ptr() == place


@pytest.mark.parametrize("view", [lambda t: t[:, 5:7], lambda t: t.numpy(), lambda t: t.detach()])
def test_a_view_keeps_its_memory(view):
    t = take(4).fill_(1)
    kept = view(t)
    del t
    others = [take(4).fill_(2) for _ in range(3)]
    assert (torch.as_tensor(kept) == 1).all()
    assert len(others) == 3


def test_tensors_that_live_together_share_nothing():
    rng, alive = random.Random(0), []
    for step in range(400):
        if alive and rng.random() < 0.5:
            t, value = alive.pop(rng.randrange(len(alive)))
            assert (t.flatten()[[0, -1]] == value).all()
        t = take(rng.choice([1, 1.5, 2, 3, 4.25, 8]))
        assert not any(
            span(t).start < span(o).stop and span(o).start < span(t).stop for o, _ in alive
        )
        alive.append((t.fill_(step), step))
        alive = alive[-12:]


def test_what_is_kept_is_bounded_by_what_was_in_use():
    """Sizes that never come again, as of images that grow, do not pile up."""
    most = 0
    for mib in range(2, 60):
        tensors = [take(mib), take(mib)]
        most = max(most, sum(t.numel() * t.element_size() for t in tensors))
        del tensors
    assert 0 < ops.release_kept() <= 1.25 * most
    # and that is forgotten: 1 MiB in use allows for little more
    for mib in (1, 2, 1.5):
        take(mib)
    assert ops.release_kept() <= 2.5 * MIB


def test_clear_caches_frees_it():
    take(4)
    resfast.clear_caches()
    assert ops.release_kept() == 0


def test_threads():
    failures = []

    def work(value: int) -> None:
        for _ in range(200):
            t = take(1.5).fill_(value)
            if not (t == value).all():
                failures.append(value)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_forked_process_is_not_locked_out():
    """Threads are at it when the process forks, and only the forking one lives on in the child."""
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            take(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(20):
            child = os.fork()
            if child == 0:
                # a lock that is never given back would end the child by its alarm
                import signal

                signal.alarm(20)
                for _ in range(10):
                    take(1)
                os._exit(0)
            assert os.waitpid(child, 0)[1] == 0
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def test_small_tensors_and_others_are_ordinary():
    take(0.5)
    assert ops.release_kept() == 0
    assert empty_nhwc((1, MIB, 1, 1), torch.empty(0, device="meta")).device.type == "meta"
    with torch._subclasses.FakeTensorMode():
        assert type(empty_nhwc((1, MIB, 1, 1), torch.empty(0))) is not torch.Tensor


def test_bad_arguments_raise():
    with pytest.raises(RuntimeError, match="must not be negative"):
        ops.empty_kept(LIKE, 1, -1, 2, 2)
    with pytest.raises(NotImplementedError, match="resfast::empty_kept"):  # no kernel but the CPU's
        ops.empty_kept(torch.empty(0, device="meta"), 1, 1, 1, 1)


def test_the_networks_activations_are_kept():
    block = resfast.BasicBlock(64, 64)
    x = torch.randn(4, 64, 56, 56, requires_grad=True)
    block(x).sum().backward()
    assert ops.release_kept() >= 2 * x.numel() * 4  # the raw convolution outputs at least
