"""References: which samples are held, where they lie, and what happens when a disk forgets."""

from __future__ import annotations

import io
import os
import resource
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from commlib.modes import Delta
from commlib.references import References, _File

ROW = 4
STORES = ("device", "host", "disk")
CPU = torch.device("cpu")


def made(store: str = "host", rows: int = 5, row: int = ROW, **options: Any) -> References:
    mode = Delta(store, str(rows * 4 * max(1, row)), **options)  # type: ignore[arg-type]
    return References(row, torch.float32, mode, CPU)


def file_of(references: References) -> int:
    """The descriptor of a disk store."""
    assert isinstance(references._rows, _File)
    return references._rows._file


def content(sample: int, step: int) -> torch.Tensor:
    return torch.full((ROW,), 1000.0 * sample + step)


def visit(references: References, samples: Sequence[int], step: int) -> tuple[bool, ...]:
    """One step: announce, and write all."""
    fresh = references.visit(samples)
    if samples:
        references.write(samples, torch.stack([content(s, step) for s in samples]))
    return fresh


def held(references: References, samples: Sequence[int]) -> torch.Tensor:
    out = torch.empty(len(samples), references.row, dtype=references.dtype)
    references.read(samples, out)
    return out


class Model:
    """The same store as a list of (sample, content), the oldest first, and visits of each."""

    def __init__(self, capacity: int, raw: int) -> None:
        self.capacity, self.raw = capacity, raw
        self.rows: list[tuple[int, torch.Tensor]] = []
        self.visits: dict[int, int] = {}

    def visit(self, samples: Sequence[int], step: int) -> tuple[bool, ...]:
        before = {sample: self.visits[sample] for sample, _ in self.rows}
        stay = [each for each in self.rows if each[0] not in samples]
        room = self.capacity - len(samples)
        stay = stay[max(0, len(stay) - room) :]
        self.rows = [*stay, *((s, content(s, step)) for s in samples)]
        self.visits = before | {sample: before.get(sample, 0) + 1 for sample in samples}
        return tuple(before.get(sample, 0) < self.raw for sample in samples)


steps_of_ids = st.lists(
    st.lists(st.integers(0, 11), unique=True, max_size=5), min_size=1, max_size=12
)


@settings(deadline=None, max_examples=40)
@given(steps=steps_of_ids, store=st.sampled_from(STORES), raw=st.integers(1, 3))
def test_the_store_is_a_least_recently_visited_one(
    steps: list[list[int]], store: str, raw: int
) -> None:
    references, model = made(store, raw=raw), Model(5, raw)
    for number, samples in enumerate(steps):
        assert visit(references, samples, number) == model.visit(samples, number)
        assert list(references._slots) == [sample for sample, _ in model.rows]
        if model.rows:
            samples_held = [sample for sample, _ in model.rows]
            assert held(references, samples_held).equal(torch.stack([r for _, r in model.rows]))
    assert len(references) == len(model.rows)


@settings(deadline=None, max_examples=30)
@given(steps=steps_of_ids, cut=st.integers(0, 12), raw=st.integers(1, 3))
def test_the_store_is_a_function_of_the_ids(steps: list[list[int]], cut: int, raw: int) -> None:
    """In any storage, and over a restart: the same digests."""
    ends = [made(store, raw=raw) for store in STORES]
    for number, samples in enumerate(steps):
        if number == cut:
            state = ends[0].state_dict()
            ends[0] = made("disk", raw=raw)
            ends[0].load_state_dict(state)
        assert len({visit(end, samples, number) for end in ends}) == 1
        assert len({end.history() for end in ends}) == 1
        assert len({end.checksum() for end in ends}) == 1


def test_digests_tell_ids_order_and_bytes_apart() -> None:
    def digests(steps: list[list[int]], value: int = 0) -> tuple[int, int]:
        references = made()
        for samples in steps:
            visit(references, samples, value)
        return references.history(), references.checksum()

    one = digests([[1, 2], [3]])
    assert digests([[1, 2], [3]]) == one
    for other in ([[2, 1], [3]], [[1, 2], [4]], [[1, 2]], [[3], [1, 2]]):
        history, checksum = digests(other)
        assert history != one[0]
        assert checksum != one[1]
    history, checksum = digests([[1, 2], [3]], value=1)
    assert history == one[0]
    assert checksum != one[1]


def test_digests_know_whose_bytes_they_are() -> None:
    def checksum(order: list[int], written: list[int]) -> int:
        references = made()
        references.visit(order)
        references.write(written, torch.zeros(len(written), ROW))
        return references.checksum()

    cases = [([1, 2], [1, 2]), ([2, 1], [1, 2]), ([1, 2], [1]), ([1, 2], [2])]
    assert len({checksum(*case) for case in cases}) == 4


def test_refused_visits_change_nothing() -> None:
    references = made()
    visit(references, [1, 2, 3], 0)
    before = references.history(), references.checksum(), list(references._slots)
    with pytest.raises(ValueError, match="sample 7 stands twice in one step"):
        references.visit([7, 8, 7])
    with pytest.raises(
        ValueError, match="a step of 6 samples, the cap of 80 has room for 5; raise"
    ):
        references.visit(range(10, 16))
    with pytest.raises(ValueError, match="beyond 64 bits"):
        references.visit([1, 1 << 63])
    assert (references.history(), references.checksum(), list(references._slots)) == before
    assert references.visit([-(1 << 63), (1 << 63) - 1]) == (True, True)


def test_a_cap_without_room_is_refused() -> None:
    with pytest.raises(ValueError, match=r"cap=15 has no room for one sample of 4 .* \(16 bytes\)"):
        References(4, torch.float32, Delta(cap="15"), CPU)
    assert References(4, torch.bfloat16, Delta(cap="15"), CPU).capacity == 1


def test_an_announced_sample_whose_message_never_came_is_a_first_visit_again() -> None:
    """What lies in its slot is nothing, or another sample's."""
    references, other = made(), made()
    visit(references, range(5), 0)
    visit(other, range(5), 0)
    assert references.visit([9]) == (True,)
    other.visit([9])
    assert references.checksum() == other.checksum()
    assert references.visit([9, 1]) == (True, False)
    other.visit([9, 1])
    again = made()
    again.load_state_dict(references.state_dict())
    assert again.checksum() == references.checksum()
    assert again.visit([9, 2]) == references.visit([9, 2]) == (True, False)
    references.write([9], content(9, 1)[None])
    assert references.visit([9]) == (False,)
    # Making room takes the mark along with the sample.
    visit(references, range(20, 25), 2)
    assert references.visit([9]) == (True,)


@pytest.mark.parametrize("store", STORES)
def test_memory_is_what_was_visited_and_never_above_the_cap(store: str) -> None:
    references = made(store, rows=100)
    assert references.nbytes() == 0
    visit(references, [3], 0)
    assert references.nbytes() == 16
    for step in range(60):
        visit(references, [(7 * step + place) % 150 for place in range(7)], step)
        assert len(references) * 16 <= references.nbytes() <= 100 * 16
    assert references.nbytes() == 100 * 16
    references.reset()
    assert references.nbytes() == len(references) == 0
    assert references.history() == made().history()
    assert references.checksum() == made().checksum()
    assert visit(references, [3], 0) == (True,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("store", STORES)
def test_rows_come_back_bit_for_bit(store: str, dtype: torch.dtype) -> None:
    references = References(3, dtype, Delta(store), CPU)  # type: ignore[arg-type]
    rows = torch.tensor([[0.0, -0.0, 1e-7], [float("nan"), float("-inf"), 3.14]]).to(dtype)
    references.visit([5, 6])
    references.write([5, 6], rows)
    references.visit([1])
    references.write([1], torch.ones(1, 3, dtype=dtype))
    back = held(references, [6, 5])
    assert back.view(torch.uint8).equal(rows.flip(0).view(torch.uint8))


@pytest.mark.parametrize("store", STORES)
def test_rows_of_nothing(store: str) -> None:
    references = made(store, row=0)
    assert references.visit([1, 2]) == (True, True)
    references.write([1, 2], torch.empty(2, 0))
    assert references.visit([2, 1]) == (False, False)
    assert held(references, [2, 1]).shape == (2, 0)
    again = made(store, row=0)
    again.load_state_dict(references.state_dict())
    assert again.checksum() == references.checksum()
    assert references.visit([]) == ()


def saved(references: References) -> dict[str, object]:
    file = io.BytesIO()
    torch.save(references.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)  # type: ignore[no-any-return]


@pytest.mark.parametrize("store", STORES)
def test_a_restart_goes_on_exactly(store: str) -> None:
    one = made(store)
    for step in range(9):
        visit(one, [step % 7, 10 + step % 3], step)
    state = saved(one)
    visit(one, [0, 50], 9)  # the saved state is a copy
    other = made("host")
    visit(other, [99], 0)  # what a loaded store held before is gone
    other.load_state_dict(state)
    visit(other, [0, 50], 9)
    assert (one.history(), one.checksum()) == (other.history(), other.checksum())
    assert visit(one, [1, 2, 3], 10) == visit(other, [1, 2, 3], 10)


def test_a_state_that_does_not_fit_is_refused_and_nothing_changes() -> None:
    references = made()
    visit(references, [1, 2], 0)
    state, before = saved(references), references.checksum()
    for other in (made(row=3), References(ROW, torch.bfloat16, Delta(), CPU)):
        with pytest.raises(ValueError, match=r"are \(2, 4\) of torch.float32 for 2 samples, this"):
            other.load_state_dict(state)
    with pytest.raises(ValueError, match="the saved references are"):
        references.load_state_dict({**state, "samples": torch.tensor([1])})
    with pytest.raises(ValueError, match="2 saved references, the cap of 16 has room for 1; load"):
        made(rows=1).load_state_dict(state)
    assert references.checksum() == before


@pytest.mark.parametrize("part", ["rows", "samples", "order", "writes", "twice"])
def test_a_state_that_was_changed_is_refused_and_forgotten(part: str) -> None:
    references = made()
    visit(references, [1, 2, 3], 0)
    state = references.state_dict()
    if part == "rows":
        state["rows"][1].view(torch.uint8)[5] ^= 1
    elif part == "samples":
        state["samples"][0] = 9
    elif part == "order":
        state["samples"], state["rows"] = state["samples"].flip(0), state["rows"].flip(0)
    elif part == "writes":
        state["writes"][2] = 0
    else:
        state["samples"][1] = 1
    other = made()
    with pytest.raises(RuntimeError, match=r"do not have their checksum: .* reset\(\) at both"):
        other.load_state_dict(state)
    assert len(other) == 0
    assert other.checksum() == made().checksum()
    assert visit(other, [1], 0) == (True,)


def test_a_file_that_was_cut_short_is_an_error() -> None:
    references = made("disk")
    visit(references, [1, 2, 3], 0)
    os.ftruncate(file_of(references), 40)
    assert held(references, [1, 2]).equal(torch.stack([content(1, 0), content(2, 0)]))
    with pytest.raises(RuntimeError, match="has been cut short at byte 32; go on from"):
        held(references, [1, 3])


def test_a_byte_that_flipped_is_an_error() -> None:
    references = made("disk")
    visit(references, [1, 2, 3], 0)
    file = file_of(references)
    os.pwrite(file, bytes([os.pread(file, 1, 21)[0] ^ 4]), 21)
    assert held(references, [1]).equal(content(1, 0)[None])
    for use in (lambda: held(references, [3, 2]), references.checksum, references.state_dict):
        with pytest.raises(RuntimeError, match="has changed at byte 16; go on from"):
            use()
    references.write([2], content(2, 1)[None])
    assert held(references, [2]).equal(content(2, 1)[None])


def test_a_full_disk_is_an_error_that_says_so() -> None:
    references = made("disk")
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (24, old[1]))
        with pytest.raises(
            RuntimeError, match="is full: 8 of 16 bytes of a row were written; name"
        ):
            visit(references, [1, 2], 0)
        with pytest.raises(RuntimeError, match=r"cannot be written: .* name another folder="):
            visit(references, [3, 4], 0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)


def test_the_folder_is_used_and_left_empty(tmp_path: Path) -> None:
    references = made("disk", folder=str(tmp_path))
    visit(references, [1], 0)
    where = os.readlink(f"/proc/self/fd/{file_of(references)}")
    assert where.startswith(str(tmp_path))
    assert list(tmp_path.iterdir()) == []  # no name: nothing stays behind, even after kill -9
    with pytest.raises(ValueError, match=r"no file for references can be made in '.*none': .*name"):
        made("disk", folder=str(tmp_path / "none"))


def test_the_file_is_closed_with_the_store() -> None:
    references = made("disk")
    visit(references, [1], 0)
    file = file_of(references)
    references.reset()
    assert file_of(references) != file or os.fstat(file).st_size == 0
    file = file_of(references)
    visit(references, [1], 0)
    del references
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(file)
