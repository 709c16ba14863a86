"""The pool: memory comes back when nothing uses it, is never handed out twice, and survives threads and forks."""

from __future__ import annotations

import gc
import mmap
import os
import threading

import pytest
import torch

from tiles.runtime.cpu_memory_pool import HUGE_PAGE_BYTES, MIN_POOLED_BYTES, MemoryPool

LARGE = (3, MIN_POOLED_BYTES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_tensor_has_its_shape_and_dtype_and_takes_part_in_autograd(dtype):
    made = MemoryPool().empty(LARGE, dtype)
    assert made.shape == LARGE
    assert made.dtype == dtype
    assert made.is_contiguous()
    made.fill_(1).requires_grad_()
    (2 * made).sum().backward()
    assert (made.grad == 2).all()


def test_small_and_empty_tensors_come_from_torch():
    pool = MemoryPool()
    assert pool.empty((0, 4), torch.float32).shape == (0, 4)
    assert pool.empty((), torch.float32).shape == ()
    pool.empty((7,), torch.float32)
    assert pool.stats() == {"idle": 0, "used": 0, "peak": 0}


def test_memory_is_reused_once_the_last_tensor_that_shares_it_is_gone():
    pool = MemoryPool()
    first = pool.empty(LARGE, torch.float32)
    address = first.data_ptr()
    view = first[1:].flatten()[5:]
    del first
    gc.collect()
    other = pool.empty(LARGE, torch.float32)
    assert other.data_ptr() != address
    del view
    assert pool.empty(LARGE, torch.float32).data_ptr() == address


def test_a_graph_keeps_what_its_backward_needs():
    pool = MemoryPool()
    held = pool.empty(LARGE, torch.float32).fill_(3)
    weight = torch.ones(LARGE, requires_grad=True)
    product = held * weight
    del held
    pool.empty(LARGE, torch.float32).fill_(-1)
    product.sum().backward()
    assert (weight.grad == 3).all()


def test_it_holds_no_more_than_was_in_use_at_once():
    pool = MemoryPool()
    two = [pool.empty(LARGE, torch.float32) for _ in range(2)]
    most = pool.stats()["peak"]
    del two
    for pages in range(1, 12):
        pool.empty((pages * HUGE_PAGE_BYTES,), torch.float16)
        held = pool.stats()
        assert held["idle"] + held["used"] <= max(most, held["peak"])
    assert pool.stats()["used"] == 0


def test_threads_never_share_memory():
    pool, wrong = MemoryPool(), []

    def work(value: int) -> None:
        for _ in range(30):
            mine = pool.empty((MIN_POOLED_BYTES,), torch.float32).fill_(value)
            if not (mine == value).all():
                wrong.append(value)

    threads = [threading.Thread(target=work, args=(value,)) for value in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert pool.stats()["used"] == 0


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")  # the child only writes and leaves
def test_a_forked_process_does_not_write_into_ours():
    made = MemoryPool().empty(LARGE, torch.float32).zero_()
    child = os.fork()
    if child == 0:
        memoryview(made.numpy()).cast("B")[:4] = b"\1\1\1\1"
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert (made == 0).all()


def test_saving_and_copying_work_like_any_tensors(tmp_path):
    made = MemoryPool().empty(LARGE, torch.float32).fill_(2)
    torch.save(made, tmp_path / "made.pt")
    assert torch.equal(torch.load(tmp_path / "made.pt"), made)
    assert torch.equal(made.clone(), made)


def test_a_kernel_without_transparent_huge_pages(monkeypatch):
    """Such a Linux kernel refuses the advice with EINVAL."""

    class Refusing(mmap.mmap):
        def madvise(self, *advice):
            raise OSError(22, "Invalid argument")

    monkeypatch.setattr(mmap, "mmap", Refusing)
    assert MemoryPool().empty(LARGE, torch.float32).fill_(3).sum() == 9 * MIN_POOLED_BYTES


def test_the_default_device_and_dtype_do_not_matter():
    with torch.device("meta"):
        for shape in ((4, 4), LARGE):
            assert MemoryPool().empty(shape, torch.float32).device.type == "cpu"


def test_what_may_be_done_with_storage():
    """As docs/training.md says: shared, saved, replaced; not resized where the pool owns the memory."""
    small, large = (MemoryPool().empty(shape, torch.float32).fill_(2) for shape in ((4, 4), LARGE))
    for made in (small, large):
        made.share_memory_()
        assert made.is_shared()
        assert (made == 2).all()
        made.data = torch.zeros(1)
    small, large = (MemoryPool().empty(shape, torch.float32) for shape in ((4, 4), LARGE))
    small.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="not resizable"):
        large.untyped_storage().resize_(0)
    large.data = torch.empty(0)  # what frees the memory in its place
