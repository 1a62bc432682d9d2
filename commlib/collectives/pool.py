"""Wire buffers that are used again.

A fresh large buffer costs a page fault per 4 KiB, and glibc gives it back as soon as it is freed:
the same quantized all-reduce was 1.4 to 2.2 times slower with buffers allocated per call.

On CUDA all messages of a communicator are queued on one stream, and a buffer comes back only after
that stream was made to wait for the exchange that used it: so whoever takes it next, the stream or
an exchange behind it, comes later on the device too, though the host is long past both.

A CUDA graph keeps the buffers it was captured with. They are the allocator's, which holds memory
apart that is allocated in a capture, for as long as the graph lives; they never come in here, where
a message outside the graph would take them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch

# Buffers are kept in classes 12.5% apart, so that tensors of any size share a few of them.
STEPS_PER_DOUBLING = 8
MIN_BYTES = 256


class Pool:
    """Flat uint8 tensors by size class; safe to use from several threads.

    capturing(): whether a CUDA graph is being captured.
    """

    def __init__(self, device: torch.device, capturing: Callable[[], bool] = lambda: False) -> None:
        self.device = device
        self._capturing = capturing
        self._free: dict[int, list[torch.Tensor]] = {}
        self._lock = threading.Lock()

    def take(self, nbytes: int) -> torch.Tensor:
        """A uint8 tensor of `nbytes` bytes with any content."""
        if self._capturing():
            return torch.empty(nbytes, dtype=torch.uint8, device=self.device)
        size = size_class(nbytes)
        with self._lock:
            free = self._free.get(size)
            buffer = free.pop() if free else None
        if torch.is_inference_mode_enabled():  # whoever has it next may not be in there
            with torch.inference_mode(False):
                return self._fitting(buffer, size, nbytes)
        return self._fitting(buffer, size, nbytes)

    def _fitting(self, buffer: torch.Tensor | None, size: int, nbytes: int) -> torch.Tensor:
        if buffer is None:
            buffer = torch.empty(size, dtype=torch.uint8, device=self.device)
        # The same tensor object again where it fits: if a gloo thread were the last to hold one, it
        # would wait for the interpreter's lock between exchanges.
        return buffer if buffer.numel() == nbytes else _resized(buffer, nbytes)

    def give(self, *buffers: torch.Tensor) -> None:
        """Hand buffers back; nothing that is queued later may use them."""
        if self._capturing():
            return
        with self._lock:
            for buffer in buffers:
                self._free.setdefault(buffer.untyped_storage().nbytes(), []).append(buffer)

    def nbytes(self) -> int:
        """Bytes kept for reuse."""
        with self._lock:
            return sum(size * len(free) for size, free in self._free.items())

    def clear(self) -> None:
        """Free what is kept."""
        with self._lock:
            self._free.clear()


def _resized(buffer: torch.Tensor, nbytes: int) -> torch.Tensor:
    """The first `nbytes` of a buffer's storage: under no_grad a view does not know its base."""
    view = torch.empty(0, dtype=torch.uint8, device=buffer.device)
    return view.set_(buffer.untyped_storage(), 0, (nbytes,), (1,))


def size_class(nbytes: int) -> int:
    """The smallest class that holds `nbytes`."""
    if nbytes <= MIN_BYTES:
        return MIN_BYTES
    step = max(1, (1 << (nbytes - 1).bit_length() - 1) // STEPS_PER_DOUBLING)
    return -(-nbytes // step) * step
