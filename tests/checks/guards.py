"""Guard zones: fresh tensors lie between canaries and are filled with what no result can be."""

import functools
import math
from collections.abc import Callable, Sequence

import pytest
import torch
from torch._subclasses import FakeTensor

GUARD_BYTES = 512  # on each side; a multiple of any alignment that kernels ask for
CANARY = 0xFF  # as bytes NaN in every float type, -1 in int32
LARGE_BYTES = 1 << 30  # tensors beyond are poisoned, not guarded
HELD_BYTES = 1 << 31  # of guarded tensors that wait for a check

_empty = torch.empty
# `with torch.device(...)` keeps a list of what it changes, made at its first use: before any patch.
with torch.device("cpu"):
    _empty(0)


def poison(dtype: torch.dtype) -> float | int | bool:
    """NaN, or a number far beyond any index: an output that a kernel left unwritten is seen."""
    if dtype.is_floating_point:
        return math.nan
    return True if dtype == torch.bool else torch.iinfo(dtype).max // 3


class GuardedMemory:
    """Hands out poisoned tensors between canaries, and finds the canaries that were overwritten."""

    def __init__(self) -> None:
        self._held: list[tuple[torch.Tensor, int]] = []  # bytes with both guards; those between
        self._held_bytes = 0

    def blank(
        self, shape: Sequence[int], dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> torch.Tensor:
        """A contiguous poisoned tensor between canaries."""
        size = math.prod(shape) * dtype.itemsize
        padded = _empty(size + 2 * GUARD_BYTES, dtype=torch.uint8, device=device)
        padded[:GUARD_BYTES] = CANARY
        padded[GUARD_BYTES + size :] = CANARY
        self._held.append((padded, size))
        self._held_bytes += size
        inner = padded[GUARD_BYTES : GUARD_BYTES + size].view(dtype)
        return inner.view(tuple(shape)).fill_(poison(dtype))

    def check(self) -> None:
        """Raises AssertionError if a canary was overwritten; forgets all that was handed out."""
        held, self._held, self._held_bytes = self._held, [], 0
        for device in {padded.device for padded, _ in held}:
            group = [each for each in held if each[0].device == device]
            edges = [
                torch.cat((padded[:GUARD_BYTES], padded[GUARD_BYTES + size :]))
                for padded, size in group
            ]
            written = (torch.stack(edges) != CANARY).nonzero().tolist()
            if written:
                which, byte = written[0]
                side = "before" if byte < GUARD_BYTES else "behind"
                raise AssertionError(
                    f"written {side} a tensor of {group[which][1]} bytes, byte "
                    f"{byte % GUARD_BYTES} of its guard; {len(written)} canaries in all"
                )

    def install(self, monkeypatch: pytest.MonkeyPatch, device_type: str) -> None:
        """Until monkeypatch's undo: torch.empty, empty_like and new_empty give blank tensors."""
        for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
            monkeypatch.setattr(owner, name, self._guarding(getattr(owner, name), device_type))

    def _guarding(self, allocate: Callable[..., torch.Tensor], device_type: str):
        @functools.wraps(allocate)
        def guarded(*args, **options) -> torch.Tensor:
            tensor = allocate(*args, **options)
            if tensor.device.type != device_type or isinstance(tensor, FakeTensor):
                return tensor
            if not tensor.is_contiguous() or tensor.nbytes > LARGE_BYTES:
                return tensor.fill_(poison(tensor.dtype))
            if self._held_bytes > HELD_BYTES:
                self.check()
            return self.blank(tensor.shape, tensor.dtype, tensor.device)

        return guarded
