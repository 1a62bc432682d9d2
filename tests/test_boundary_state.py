"""What a boundary remembers: saved, loaded, reset, and after a step that broke off."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.boundaries import Told, agree, ends, play, same, saved, send, steps

RESUMED = ["int2:round=stochastic", "int3+lep:dtype=int8", "int2:round=stochastic+delta"]
RESUMED += ["int4+delta:store=disk", "int4+delta:cap=4KiB", "int2:round=stochastic+reuse"]
RESUMED += ["sign+reuse:first=coded"]


@pytest.mark.parametrize("text", RESUMED)
def test_a_resumed_run_is_the_uninterrupted_one(text: str) -> None:
    shape = (4, 70)
    told = list(steps(9, shape, torch.float32))
    whole = ends(text, shape)
    want = [play(whole, each) for each in told]
    first, second = ends(text, shape), ends(text, shape)
    for each in told[:5]:
        play(first, each)
    play(second, told[7]._replace(fresh=True))  # what it held is gone
    for old, new in zip(first, second, strict=True):
        new.load_state_dict(saved(old))
    play(first, told[6]._replace(fresh=True))  # the saved state is a copy
    for each, expected in zip(told[5:], want[5:], strict=True):
        got = play(second, each)
        assert all(same(a, b) for a, b in zip(got, expected, strict=True))
    assert [end.history() for end in second] == [end.history() for end in whole]
    assert [end.checksum() for end in second] == [end.checksum() for end in whole]
    states = [{k: v for k, v in end.state_dict().items() if k != "references"} for end in second]
    assert str(states) == str(
        [{k: v for k, v in end.state_dict().items() if k != "references"} for end in whole]
    )


def test_references_may_move_to_another_place(tmp_path: Path) -> None:
    one = ends("int4+delta", (4, 70))
    other = ends(f"int4+delta:store=disk:folder={tmp_path}", (4, 70))
    told = list(steps(6, (4, 70), torch.float32))
    for each in told[:4]:
        play(one, each)
    other[1].load_state_dict(saved(one[1]))
    mixed = [one[0], other[1]]  # each end keeps them where it likes
    for each in told[4:]:
        play(mixed, each)
        assert agree(mixed)


@pytest.mark.parametrize("text", ["int4+delta", "int4+reuse"])
def test_a_state_that_was_changed_is_refused_and_forgotten(text: str) -> None:
    pair = ends(text, (4, 70))
    for told in steps(2, (4, 70), torch.float32):
        play(pair, told)
    state = saved(pair[0])
    held = state["references"]["rows"] if "delta" in text else state["batches"]["1"]
    held.view(torch.uint8).view(-1)[9] ^= 1
    other = ends(text, (4, 70))[0]
    with pytest.raises(RuntimeError, match="do not have their checksum: "):
        other.load_state_dict(state)
    assert other.checksum() == ends(text, (4, 70))[0].checksum()


def test_a_state_of_another_boundary_is_refused() -> None:
    (one, _), (other, _) = ends("int4+reuse", (4, 70)), ends("int4+delta", (4, 70))
    with pytest.raises(ValueError, match=r"has scheme int4:.*delta, the state is of .*reuse; load"):
        other.load_state_dict(saved(one))
    pair = ends("int4+reuse", (2, 3))
    play(pair, Told([], True, [torch.ones(2, 3)]))
    with pytest.raises(ValueError, match=r"a saved micro-batch is \(6,\) .* tensor \(4, 70\)"):
        one.load_state_dict(saved(pair[0]))


def test_reset_at_both_ends_is_a_beginning() -> None:
    for text in ("int4+delta", "int4+reuse", "int4+lep"):
        pair, told = ends(text, (4, 70)), next(steps(1, (4, 70), torch.float32))
        want = play(pair, told)
        wire = torch.zeros(pair[0].nbytes(), dtype=torch.uint8)
        pair[0].encode(told.tensors[0], wire)  # never arrives
        assert not agree(pair)
        for end in pair:
            end.reset()
            assert end.memory_bytes() == 0
        assert agree(pair)
        got = play(pair, told)
        assert all(same(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("text", ["int4+delta", "int4+reuse"])
def test_a_step_begins_anew_after_a_reset_or_a_restart(text: str) -> None:
    one, other = ends(text, (4, 70))
    told = next(steps(1, (4, 70), torch.float32))
    for end in (one, other):
        end.begin(told.samples, fresh=True)
    one.load_state_dict(saved(ends(text, (4, 70))[0]))
    other.reset()
    for end in (one, other):
        with pytest.raises(ValueError, match="begin"):
            end.nbytes()


def test_a_step_that_broke_off_leaves_no_reference_without_a_message() -> None:
    """Announced samples whose messages never came: first visits, not what lies in their slots."""
    pair = ends("int4+delta:cap=4KiB", (4, 70))
    told = list(steps(4, (4, 70), torch.float32))
    for end in pair:
        end.begin(told[0].samples)
    send(pair, told[0].tensors[0], 0)  # micro-batch 1 never comes
    again = told[0]._replace(tensors=told[1].tensors)
    out = play(pair, again)
    assert not same(out[0], again.tensors[0])
    assert same(out[1], again.tensors[1])
    assert agree(pair)


def test_memory_is_that_of_the_mode() -> None:
    told = list(steps(3, (4, 70), torch.float32))
    bytes_of = {}
    for text in ("int4", "int4+lep", "int4+reuse", "int4+delta", "int4+delta:cap=2240"):
        pair = ends(text, (4, 70))
        for each in told:
            play(pair, each._replace(fresh=True))
        bytes_of[text] = [end.memory_bytes() for end in pair]
    batch = 4 * 70 * 4
    assert bytes_of == {
        "int4": [0, 0],
        "int4+lep": [batch, 0],
        "int4+reuse": [2 * batch] * 2,
        "int4+delta": [8 * batch] * 2,  # room for 32 samples of 24: it doubles
        "int4+delta:cap=2240": [2240] * 2,
    }
