"""The guard zones themselves: what a kernel must not do is seen."""

import pytest
import torch
from torch._subclasses import FakeTensor, FakeTensorMode

from tests.checks.guards import GUARD_BYTES, GuardedMemory

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.int32, torch.uint8, torch.bool)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_blank_tensors_are_poisoned_and_aligned(dtype):
    tensor = GuardedMemory().blank((3, 5), dtype)
    assert tensor.shape == (3, 5) and tensor.dtype == dtype and tensor.is_contiguous()
    assert tensor.data_ptr() % 16 == 0
    assert tensor.isnan().all() if dtype.is_floating_point else (tensor > 80).all() or tensor.all()


@pytest.mark.parametrize("at", [-1, -GUARD_BYTES // 4, 15, 14 + GUARD_BYTES // 4])
def test_a_write_outside_is_found(at):
    memory = GuardedMemory()
    memory.blank((7,), torch.float32)
    tensor = memory.blank((3, 5), torch.int32)
    around = torch.as_strided(tensor, (1,), (1,), tensor.storage_offset() + at)
    around.fill_(7)
    side = "before" if at < 0 else "behind"
    with pytest.raises(AssertionError, match=f"written {side} a tensor of 60 bytes"):
        memory.check()
    memory.check()  # what was found is forgotten


def test_writes_inside_pass():
    memory = GuardedMemory()
    memory.blank((3, 5), torch.int32).fill_(7)
    memory.check()


def test_tensors_without_memory_are_left_alone(monkeypatch):
    """As torch.compile traces with them."""
    memory = GuardedMemory()
    memory.install(monkeypatch, "cpu")
    with FakeTensorMode():
        assert isinstance(torch.empty(3), FakeTensor)
    memory.check()


@pytest.mark.parametrize(
    "allocate",
    [
        lambda: torch.empty(4),
        lambda: torch.empty_like(torch.zeros(4)),
        lambda: torch.zeros(2).new_empty(4),
    ],
    ids=["empty", "empty_like", "new_empty"],
)
def test_installed_memory_guards_every_allocation(allocate, monkeypatch):
    memory = GuardedMemory()
    memory.install(monkeypatch, "cpu")
    tensor = allocate()
    assert tensor.isnan().all()
    torch.as_strided(tensor, (1,), (1,), tensor.storage_offset() + 4).zero_()
    with pytest.raises(AssertionError, match="behind a tensor of 16 bytes"):
        memory.check()


def test_other_devices_are_left_alone(monkeypatch):
    GuardedMemory().install(monkeypatch, "cuda")
    assert torch.empty(2, device="meta").is_meta


def test_a_device_context_keeps_its_device_beside_patched_functions(monkeypatch):
    GuardedMemory().install(monkeypatch, "cpu")
    with torch.device("meta"):
        assert torch.nn.Linear(2, 3).weight.device.type == "meta"
