"""References: the last reconstruction of every sample, which both ends of a boundary hold.

A function of the sequence of samples alone: which visits are first ones, and which samples make
room for them, both ends find out by themselves, and nothing about it is sent. Whoever was visited
longest ago makes room. The samples of one step are announced together, in their order, so that no
sample of a step makes room for another one of it.

Rows lie in memory (`_Memory`: on the device or the host) or in a file (`_File`), whose rows carry a
checksum: what a disk has lost or changed is an error, not an activation.
"""

from __future__ import annotations

import os
import tempfile
import weakref
import zlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch

from .modes import Delta

ROLLING = 0x636F6D6C
"""Where the digest of a sequence of samples begins."""
PORTION = 16 << 20
"""Bytes of rows that are read at once where all of them are."""


class Rows(Protocol):
    """Rows of one size by slot. A slot is written before it is read."""

    def read(self, slots: Sequence[int], out: torch.Tensor) -> None:
        """`out` (n, row) becomes the rows in `slots`."""

    def write(self, slots: Sequence[int], rows: torch.Tensor) -> None:
        """The rows in `slots` become `rows` (n, row)."""

    def nbytes(self) -> int:
        """Bytes taken."""


class References:
    """One reference of `row` elements per sample, as many as the mode's cap has room for.

    Args:
        row: elements of a sample's tensor.
        dtype: of the tensor; references are kept in it.
        mode: where and how much.
        device: of the tensors.

    Raises: ValueError: the cap has no room for one row.
    """

    def __init__(self, row: int, dtype: torch.dtype, mode: Delta, device: torch.device) -> None:
        self.row, self.dtype, self.mode, self.device = row, dtype, mode, device
        self.capacity = mode.cap_bytes // max(1, row * dtype.itemsize)
        if self.capacity < 1:
            raise ValueError(
                f"delta: cap={mode.cap} has no room for one sample of {row} values of {dtype} "
                f"({row * dtype.itemsize} bytes); raise the cap"
            )
        self._slots: OrderedDict[int, int] = OrderedDict()  # the sample visited longest ago first
        # Counted up to `raw`. An announced sample's message may never have come.
        self._writes: dict[int, int] = {}
        self._rows = self._storage()
        self._history = ROLLING

    def __len__(self) -> int:
        return len(self._slots)

    def __contains__(self, sample: int) -> bool:
        """Whether it has a reference."""
        return sample in self._writes

    def visit(self, samples: Sequence[int]) -> tuple[bool, ...]:
        """Announce the samples of a step, in order; which of them travel raw.

        Raises: ValueError, and nothing has changed: a sample stands twice, or there are more than
            fit into the cap.
        """
        if len(set(samples)) != len(samples):
            twice = next(s for n, s in enumerate(samples) if s in samples[:n])
            raise ValueError(
                f"delta: sample {twice} stands twice in one step; its reference would depend on "
                "which is coded first. Give every sample of a step an id of its own"
            )
        if len(samples) > self.capacity:
            raise ValueError(
                f"delta: a step of {len(samples)} samples, the cap of {self.mode.cap} has room for "
                f"{self.capacity}; raise the cap"
            )
        try:
            names = np.array(samples, dtype="<i8").tobytes()
        except OverflowError:
            raise ValueError("delta: a sample's id is beyond 64 bits; number the samples") from None
        fresh = tuple([self._writes.get(sample, 0) < self.mode.raw for sample in samples])
        known = [sample for sample in samples if sample in self._slots]
        for sample in known:
            self._slots.move_to_end(sample)
        if len(known) < len(samples):
            for sample in samples:
                if sample not in self._slots:
                    self._slots[sample] = self._room()
                self._slots.move_to_end(sample)  # all of a step in their order
        self._history = zlib.crc32(names, self._history)
        return fresh

    def read(self, samples: Sequence[int], out: torch.Tensor) -> None:
        """`out` (n, row) becomes the references of `samples`."""
        self._rows.read([self._slots[s] for s in samples], out)

    def write(self, samples: Sequence[int], rows: torch.Tensor) -> None:
        """The references of `samples` become `rows` (n, row)."""
        self._rows.write([self._slots[s] for s in samples], rows)
        for sample in samples:
            self._writes[sample] = min(self._writes.get(sample, 0) + 1, self.mode.raw)

    def history(self) -> int:
        """A digest of all visits so far: equal where both ends were told the same samples."""
        return self._history

    def checksum(self) -> int:
        """A digest of what is held: samples, their order, and every byte of their references."""
        total = zlib.crc32(str([(s, self._writes.get(s, 0)) for s in self._slots]).encode())
        for _, rows in self._portions():
            data: Any = rows.view(torch.uint8).numpy()
            total = zlib.crc32(data, total)
        return total

    def nbytes(self) -> int:
        """Bytes of references."""
        return self._rows.nbytes()

    def reset(self) -> None:
        """Forget all samples."""
        self._slots.clear()
        self._writes.clear()
        self._rows = self._storage()
        self._history = ROLLING

    def state_dict(self) -> dict[str, Any]:
        """Samples in their order, their rows on the host (all at once), and a checksum."""
        rows = torch.zeros(len(self), self.row, dtype=self.dtype)
        places = {sample: place for place, sample in enumerate(self._slots)}
        for samples, portion in self._portions():
            rows[[places[s] for s in samples]] = portion
        return {
            "samples": torch.tensor(list(self._slots), dtype=torch.int64),
            "writes": torch.tensor(
                [self._writes.get(s, 0) for s in self._slots], dtype=torch.int64
            ),
            "rows": rows,
            "history": self._history,
            "checksum": self.checksum(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict()`.

        Raises: ValueError, and nothing has changed: rows of another size or dtype, or more than the
            cap has room for. RuntimeError, and all is forgotten: not the rows that were saved.
        """
        samples, rows, writes = state["samples"].tolist(), state["rows"], state["writes"].tolist()
        good = rows.shape[1:] == (self.row,) and rows.dtype == self.dtype
        if not good or not len(rows) == len(samples) == len(writes):
            raise ValueError(
                f"delta: the saved references are {tuple(rows.shape)} of {rows.dtype} for "
                f"{len(samples)} samples, this boundary has rows of {self.row} of {self.dtype}"
            )
        if len(samples) > self.capacity:
            raise ValueError(
                f"delta: {len(samples)} saved references, the cap of {self.mode.cap} has room for "
                f"{self.capacity}; load them with the cap they were saved with"
            )
        self.reset()
        self._slots.update((sample, slot) for slot, sample in enumerate(samples))
        for slot, sample in enumerate(samples):
            if writes[slot]:
                self._rows.write([slot], rows[slot : slot + 1])
                self._writes[sample] = writes[slot]
        self._history = state["history"]
        if self.checksum() != state["checksum"]:
            self.reset()
            raise RuntimeError(
                "delta: the saved references do not have their checksum: the file they were read "
                "from has changed since it was written. Load another checkpoint, or reset() at "
                "both ends"
            )

    def _room(self) -> int:
        """A slot that nobody holds, or else that of the sample visited longest ago."""
        if len(self._slots) < self.capacity:
            return len(self._slots)
        oldest, slot = self._slots.popitem(last=False)
        self._writes.pop(oldest, None)
        return slot

    def _portions(self) -> Iterator[tuple[list[int], torch.Tensor]]:
        """All samples that have a reference, in their order, and their rows on the host."""
        samples = [s for s in self._slots if s in self._writes]
        count = max(1, PORTION // max(1, self.row * self.dtype.itemsize))
        for start in range(0, len(samples), count):
            some = samples[start : start + count]
            rows = torch.empty(len(some), self.row, dtype=self.dtype)
            self.read(some, rows)
            yield some, rows

    def _storage(self) -> Rows:
        if self.mode.store == "disk":
            return _File(self.row, self.dtype, self.mode.folder or tempfile.gettempdir())
        device = self.device if self.mode.store == "device" else torch.device("cpu")
        return _Memory(self.row, self.dtype, device, self.capacity)


class _Memory:
    """Rows in memory, in a tensor that doubles as it fills."""

    def __init__(self, row: int, dtype: torch.dtype, device: torch.device, capacity: int) -> None:
        self._capacity = capacity
        self._rows = torch.empty(0, row, dtype=dtype, device=device)

    def read(self, slots: Sequence[int], out: torch.Tensor) -> None:
        index = self._index(slots)
        if isinstance(index, torch.Tensor) and out.device == self._rows.device:
            torch.index_select(self._rows, 0, index, out=out)
        else:
            out.copy_(self._rows[index])

    def write(self, slots: Sequence[int], rows: torch.Tensor) -> None:
        needed = max(slots, default=-1) + 1
        if needed > len(self._rows):
            count = min(self._capacity, max(needed, 2 * len(self._rows)))
            grown = self._rows.new_empty(count, self._rows.shape[1])
            grown[: len(self._rows)] = self._rows
            self._rows = grown
        self._rows[self._index(slots)] = rows.to(self._rows.device)

    def nbytes(self) -> int:
        return self._rows.nbytes

    def _index(self, slots: Sequence[int]) -> slice | torch.Tensor:
        first, count = (slots[0], len(slots)) if slots else (0, 0)
        if list(slots) == list(range(first, first + count)):  # as in a first epoch: no gather
            return slice(first, first + count)
        return torch.tensor(slots, device=self._rows.device)


class _File:
    """Rows in a file of its own without a name: it is gone with the process, however that ends.

    Read and written by position instead of mapped: a file that was cut short is an error here, and
    the end of the process where it is mapped.
    """

    def __init__(self, row: int, dtype: torch.dtype, folder: str) -> None:
        self._row, self._dtype, self._folder = row, dtype, folder
        self._size = row * dtype.itemsize
        try:
            file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115
        except OSError as error:
            raise ValueError(
                f"delta: no file for references can be made in {folder!r}: {error}; name another "
                "folder= or a store= in memory"
            ) from error
        self._file = file.fileno()
        self._sums: dict[int, int] = {}
        weakref.finalize(self, file.close)

    def read(self, slots: Sequence[int], out: torch.Tensor) -> None:
        rows = torch.empty(len(slots), self._row, dtype=self._dtype)
        data: Any = rows.view(torch.uint8).numpy()
        for place, slot in enumerate(slots):
            start, row = slot * self._size, data[place]
            found = os.preadv(self._file, [row], start) if self._size else 0
            if found != self._size or zlib.crc32(row) != self._sums[slot]:
                what = "has been cut short" if found < self._size else "has changed"
                raise RuntimeError(
                    f"delta: the file of references in {self._folder!r} {what} at byte {start}; "
                    "go on from a checkpoint"
                )
        out.copy_(rows)

    def write(self, slots: Sequence[int], rows: torch.Tensor) -> None:
        data: Any = rows.detach().cpu().contiguous().view(torch.uint8).numpy()
        for place, slot in enumerate(slots):
            try:
                done = os.pwrite(self._file, data[place], slot * self._size)
            except OSError as error:
                raise RuntimeError(
                    f"delta: the file of references in {self._folder!r} cannot be written: {error};"
                    " name another folder=, or a smaller cap="
                ) from error
            if done != self._size:
                raise RuntimeError(
                    f"delta: the disk of {self._folder!r} is full: {done} of {self._size} bytes of "
                    "a row were written; name another folder=, or a smaller cap="
                )
            self._sums[slot] = zlib.crc32(data[place])

    def nbytes(self) -> int:
        return len(self._sums) * self._size
