"""reduce_scatter_segments and all_gather_segments: rows of named shards, as FSDP2 has them."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

import commlib
from commlib import Communicator, Policy, Scheme
from commlib.policy import Rule
from commlib.scheme import Role
from tests.communicators import data, on_ranks, only

WORLDS = (1, 2, 3, 4, 7)
# A matrix, a bias, a matrix under another scheme, a matrix, a parameter whose rows are empty.
KEYS = ("w", "bias", "embed", "v", "none")
SIZES = (640, 9, 1000, 257, 0)
NDIMS = (2, 1, 2, 2, 2)
STARTS = (0, 640, 649, 1649, 1906)
ROW = sum(SIZES)


def policy(main: str = "int4+ef", embed: str = "int8+ef") -> Policy:
    """Two schemes and exact vectors; the large matrix alone has no room for the bias to ride."""
    lossy = Rule(Scheme.parse(main), min_numel=1, min_ndim=2)
    return Policy((Rule(Scheme.parse(embed), key="embed"), lossy, Rule(Scheme.parse("fp32"))))


def reduce_scatter(c: Communicator, step: int, keys: tuple[str, ...] = KEYS, **how: Any) -> Any:
    """This rank's sums by name, of one step whose gradients every rank can tell."""
    places = [KEYS.index(key) for key in keys]
    rows = data(c.rank, c.size * ROW, step).view(c.size, ROW)
    x = torch.cat([rows[:, STARTS[p] : STARTS[p] + SIZES[p]] for p in places], 1).reshape(-1)
    sizes = tuple(SIZES[p] for p in places)
    out = torch.full((sum(sizes),), 9e9)
    c.reduce_scatter_segments(out, x, keys, sizes, tuple(NDIMS[p] for p in places), **how).wait()
    return dict(zip(keys, out.split(sizes), strict=True))


def true_sums(size: int, rank: int, step: int) -> dict[str, torch.Tensor]:
    rows = [data(r, size * ROW, step).view(size, ROW)[rank] for r in range(size)]
    total = torch.zeros(ROW)
    for row in rows:  # rank order, fp32: what exact segments promise to the bit
        total += row
    return dict(zip(KEYS, total.split(SIZES), strict=True))


@pytest.mark.parametrize("size", WORLDS)
@pytest.mark.parametrize("embed", ["int8+ef", "int4+ef"])
@pytest.mark.parametrize("async_op", [False, True])
def test_sums_by_name(size: int, embed: str, async_op: bool) -> None:
    """Each parameter is what it is in a message of its own, exact ones to the bit."""

    def body(c: Communicator) -> None:
        alone = {
            key: Scheme.parse("int4+ef" if key != "embed" else embed) for key in ("w", "embed")
        }
        for step in range(3):
            found = reduce_scatter(c, step, factor=0.5, async_op=async_op)
            want = true_sums(size, c.rank, step)
            assert torch.equal(found["bias"], 0.5 * want["bias"])
            assert found["none"].numel() == 0
            for key, scheme in alone.items():
                place, n = STARTS[KEYS.index(key)], SIZES[KEYS.index(key)]
                rows = data(c.rank, size * ROW, step).view(size, ROW)[:, place : place + n]
                out = torch.empty(n)
                c.reduce_scatter(
                    out, rows.contiguous(), f"alone.{key}", factor=0.5, scheme=scheme
                ).wait()
                assert torch.equal(out, found[key]), key
            levels = {"w": 7, "v": 7, "embed": 127 if embed == "int8+ef" else 7}
            for key, top in levels.items():
                # a code's step is max / top with a bf16 scale; twice that where a residual joins
                bound = 0.5 * size * 1.01 / top * (5.0 + 5.0 / top)
                assert (found[key] - 0.5 * want[key]).abs().max() <= bound

    on_ranks(size, policy(embed=embed), body)


@pytest.mark.parametrize("size", WORLDS)
def test_it_is_the_first_half_of_two_phase(size: int) -> None:
    """With rows of whole blocks, chunk r of an all_reduce whose second half is exact."""

    def body(c: Communicator) -> None:
        n = 384
        for step in range(2):
            x = data(c.rank, size * n, step)
            out = torch.empty(n)
            c.reduce_scatter_segments(out, x, ("a", "b"), (256, 128), (2, 2), factor="avg").wait()
            rows = x.view(size, n)
            for key, part in (("a", slice(0, 256)), ("b", slice(256, 384))):
                whole = rows[:, part].clone()
                c.all_reduce(
                    whole, f"{key}.whole", factor="avg", scheme="int8+ef@two_phase:back=fp32"
                )
                if size == 1:  # nothing is coded
                    assert torch.equal(out[part], x[part])
                else:
                    assert torch.equal(whole[c.rank], out[part]), key

    on_ranks(size, only("int8+ef"), body)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("dtype", ["fp32", "int8"])
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(size: int, dtype: str) -> None:
    """Also where parameters were missing on some step, so that groups differ."""
    how = policy(f"int4:round=stochastic:block=64+ef:omega=0.5:dtype={dtype}")
    groups = [KEYS, ("w", "v"), ("bias", "embed", "none"), KEYS]

    def run(c: Communicator, steps: range) -> list[dict[str, torch.Tensor]]:
        return [reduce_scatter(c, step, groups[step % 4]) for step in steps]

    def interrupted(c: Communicator) -> Any:
        early = run(c, range(5))
        return early, c.state_dict()

    whole = on_ranks(size, how, lambda c: run(c, range(8)))
    halves = on_ranks(size, how, interrupted)
    shapes = {k: tuple(v.shape) for k, v in _residuals(halves[0][1]).items()}
    assert shapes == {
        "w": (size, 640),
        "v": (size, 257),
        "embed": (size, 1000),
        "bias": (size, 9),
        "none": (size, 0),
    }

    def resumed(c: Communicator) -> Any:
        c.load_state_dict(halves[c.rank][1])
        return run(c, range(5, 8))

    for rank, late in enumerate(on_ranks(size, how, resumed)):
        for got, want in zip([*halves[rank][0], *late], whole[rank], strict=True):
            assert all(torch.equal(got[key], want[key]) for key in want)


def _residuals(state: dict[str, Any]) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for saved in state["compressors"].values():
        found |= saved["residuals"]
    return found


def test_the_policy_counts_whole_tensors() -> None:
    """A shard of 200 values of a matrix of 4000 is compressed, under a rule from 1024 on."""

    def body(c: Communicator, numels: tuple[int, ...] | None) -> int:
        out = torch.empty(200)
        c.reduce_scatter_segments(out, data(c.rank, 400), ("w",), (200,), (2,), numels).wait()
        return c.transport.bytes_sent

    raw = on_ranks(2, "int8", lambda c: body(c, None))
    coded = on_ranks(2, "int8", lambda c: body(c, (4000,)))
    assert raw == [800, 800]
    assert coded == [208 + 16, 208 + 16]


def test_what_is_not_compressed_may_be_the_librarys_own() -> None:
    def body(c: Communicator) -> list[str]:
        calls: list[str] = []
        out, x, sizes = torch.empty(300), data(c.rank, 600), (200, 100)
        how: Any = {"keys": ("w", "u"), "ndims": (2, 2), "numels": (4000, 1000)}
        for _ in range(2):
            own = partial(calls.append, "sum")
            c.reduce_scatter_segments(out, x, sizes=sizes, own=own, **how)
            c.all_reduce_segments(x, sizes=(400, 200), own=own, **how)
            c.all_gather_segments(x, out, sizes=sizes, own=partial(calls.append, "gather"), **how)
        return calls

    everything = ["sum", "sum", "gather"] * 2
    assert on_ranks(2, "fp32", body)[0] == everything
    assert on_ranks(2, "int8", body)[0] == []
    # Sums go in rank order under a policy that compresses others; a copy is a copy.
    large = Policy((Rule(Scheme.parse("int8"), min_numel=5000), Rule(Scheme.parse("fp32"))))
    assert on_ranks(2, large, body)[0] == ["gather"] * 2

    def stretch(c: Communicator) -> list[str]:
        with commlib.exact():
            return body(c)

    assert on_ranks(2, "int8", stretch)[0] == everything


@pytest.mark.parametrize("size", WORLDS)
@pytest.mark.parametrize("embed", ["int8", "int4"])
@pytest.mark.parametrize("aliased", [False, True])
def test_gathered_by_name(size: int, embed: str, aliased: bool) -> None:
    """The same bits on all ranks; exact segments exact; blocks restart at each name."""

    def body(c: Communicator) -> torch.Tensor:
        mine, out = data(c.rank, ROW), torch.zeros(size * ROW)
        x = out.view(size, ROW)[c.rank].copy_(mine) if aliased else mine
        c.all_gather_segments(out, x, KEYS, SIZES, NDIMS, async_op=True).wait()
        rows = out.view(size, ROW)
        for place, (key, n) in enumerate(zip(KEYS, SIZES, strict=True)):
            part = slice(STARTS[place], STARTS[place] + n)
            top = {"bias": 0, "embed": 127 if embed == "int8" else 7}.get(key, 7)
            for r in range(size):
                want = data(r, ROW)[part]
                if top == 0 or size == 1:
                    assert torch.equal(rows[r, part], want), (key, r)
                else:
                    for block in range(0, n, 128):
                        a, b = rows[r, part][block : block + 128], want[block : block + 128]
                        assert (a - b).abs().max() <= 0.51 * b.abs().max() / top
        return out

    outs = on_ranks(size, policy("int4", embed), body)
    assert all(torch.equal(out, outs[0]) for out in outs)


@pytest.mark.parametrize(
    ("call", "complaint"),
    [
        (lambda c, x: c.reduce_scatter_segments(x[:5], x, ("a",), (5,)), "must hold 2 x out"),
        (lambda c, x: c.all_gather_segments(x, x[:5], ("a",), (5,)), "must hold 2 x x"),
        (lambda c, x: c.reduce_scatter_segments(x[:6], x, ("a",), (5,)), "in each of 2 rows"),
        (lambda c, x: c.reduce_scatter_segments(x[:6], x, ("a", "a"), (1, 5)), "names one tensor"),
        (lambda c, x: c.all_gather_segments(x, x[:6], ("a",), (6, 0)), "1 keys, 2 sizes"),
    ],
)
def test_what_does_not_fit_is_refused_and_touches_nothing(call: Any, complaint: str) -> None:
    def body(c: Communicator) -> int:
        with pytest.raises(ValueError, match=complaint):
            call(c, torch.ones(12))
        return c.transport.bytes_sent

    assert on_ranks(2, "int8", body) == [0, 0]


@pytest.mark.parametrize("size", WORLDS)
@pytest.mark.parametrize("embed", ["int4+delta", "int8"])
def test_gathered_differences(size: int, embed: str) -> None:
    """Updates of a thousandth arrive to some percent of the update; all ranks hold the same bits;
    exact segments stay exact; what has not changed does not travel."""
    how = policy("int4+delta", embed)

    def body(c: Communicator) -> list[torch.Tensor]:
        x, out, found = data(c.rank, ROW), torch.empty(size * ROW), []
        for step in range(6):
            sent = c.transport.bytes_sent
            unchanged = step == 3
            if not unchanged:
                before = x.clone()
                x += 1e-3 * data(c.rank, ROW, step + 1)
                x[640:649] *= 31.0 ** (step % 3 - 1)  # a sum of differences would round
            c.all_gather_segments(
                out, x, KEYS, SIZES, NDIMS, async_op=step % 2 == 0, unchanged=unchanged
            ).wait()
            found.append(out.clone())
            mine = out.view(size, ROW)[c.rank]
            assert torch.equal(mine[640:649], x[640:649]), "the bias is exact"
            if size > 1 and step > 0:
                error = (mine[:640] - x[:640]).norm() / (x[:640] - before[:640]).norm()
                assert 0 < error < 0.2, error
            if unchanged and embed == "int4+delta":
                assert c.transport.bytes_sent == sent
            elif unchanged and size > 1:  # the other scheme's segments come again
                assert sent < c.transport.bytes_sent <= sent + 1.2 * 1016 * (size - 1)
        assert size == 1 or c.memory_bytes() >= 4 * size * (640 + 257)
        return found

    outs = on_ranks(size, how, body)
    for rank in outs:
        assert all(torch.equal(a, b) for a, b in zip(rank, outs[0], strict=True))
    assert torch.equal(outs[0][3][: ROW - 1], outs[0][2][: ROW - 1])


def test_differences_resume_bitwise_from_the_own_row_alone() -> None:
    how = policy("int4+delta", "int4+delta")

    def gather(c: Communicator, step: int) -> torch.Tensor:
        x = data(c.rank, ROW) + 1e-3 * step * data(c.rank, ROW, 1)
        out = torch.empty(3 * ROW)
        c.all_gather_segments(out, x, KEYS, SIZES, NDIMS).wait()
        return out

    def early(c: Communicator) -> Any:
        for step in range(3):
            gather(c, step)
        state = c.state_dict()
        assert sum(part.numel() for part in state["copies"].values()) == ROW
        return state, gather(c, 3), gather(c, 4)

    whole = on_ranks(3, how, early)

    def late(c: Communicator) -> Any:
        c.load_state_dict(whole[c.rank][0])
        return gather(c, 3), gather(c, 4)

    def anew(c: Communicator) -> torch.Tensor:
        c.load_state_dict(whole[c.rank][0])
        gather(c, 3)
        c.forget_copies()  # the weights came from elsewhere: exact, once
        return gather(c, 40)

    for (_, *want), got in zip(whole, on_ranks(3, how, late), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))
    exact = torch.cat([data(r, ROW) + 1e-3 * 40 * data(r, ROW, 1) for r in range(3)])
    assert all(torch.equal(out, exact) for out in on_ranks(3, how, anew))


def test_differences_go_on_after_what_is_not_finite() -> None:
    """T19: one bad step is bad for that step, on all ranks."""

    def body(c: Communicator) -> list[int]:
        bad = []
        for step in range(5):
            x = data(c.rank, 1024, 0) + 1e-3 * step
            if step == 2 and c.rank == 0:
                x[3], x[500] = float("inf"), float("nan")
            out = torch.empty(2 * 1024)
            c.all_gather(out, x, "w", scheme="int8+delta").wait()
            bad.append(int((~out.isfinite()).sum()))
            if step > 3:
                assert (out[:1024].view(2, -1) - data(0, 1024, 0).view(2, -1)).abs().max() < 0.02
        return bad

    assert on_ranks(2, only("fp32"), body) == [[0, 0, 256, 0, 0]] * 2


def test_differences_begin_anew_where_a_tensor_has_another_size() -> None:
    def body(c: Communicator) -> None:
        for numel in (1024, 2048, 1, 1024):
            for _ in range(2):
                x, out = data(c.rank, numel), torch.empty(2 * numel)
                c.all_gather(out, x, "w", scheme="int8+delta").wait()
                assert (out - torch.cat([data(0, numel), data(1, numel)])).abs().max() < 1e-3

    on_ranks(2, only("fp32"), body)


def test_a_key_may_be_gathered_by_differences() -> None:
    def body(c: Communicator) -> list[float]:
        x, out, errors = data(c.rank, 500), torch.empty(1000), []
        for step in range(3):
            x += 1e-3 * data(c.rank, 500, step)
            c.all_gather(out, x, "w", scheme="int4+delta").wait()
            errors.append(float((out.view(2, 500)[c.rank] - x).norm() / x.norm()))
        with pytest.raises(ValueError, match="leave them out"):
            c.all_gather(out, x, "v", scheme="int4+delta:store=disk")
        with pytest.raises(ValueError, match="all_reduce has no memory such as delta; use int4"):
            c.all_reduce(x, "v", scheme="int4+delta")
        with pytest.raises(ValueError, match="reduce_scatter has no memory such as delta"):
            c.reduce_scatter_segments(out[:500], out, ("v",), (500,), (2,))
        return errors

    for errors in on_ranks(2, only("int4+delta"), body):
        assert errors[0] == 0
        assert all(0 < error < 2e-4 for error in errors[1:])


@pytest.mark.parametrize("scheme", ["fp32", "fp32@two_phase", "fp32@ring", "bf16", "int8+ef"])
@pytest.mark.parametrize("beside", ["fp32", "fp32@two_phase", "fp32@hierarchical"])
def test_every_segment_is_in_one_message(scheme: str, beside: str) -> None:
    """Matrices under one scheme, as much again in vectors under another, which are raw or not."""
    rules = (Rule(Scheme.parse(scheme), min_ndim=2), Rule(Scheme.parse(beside)))

    def body(c: Communicator) -> torch.Tensor:
        x = torch.cat([data(c.rank, 2 * 640, 0), data(c.rank, 2 * 640, 1)])
        keys, sizes, ndims = ("w", "b", "v", "c"), (640,) * 4, (2, 1, 2, 1)
        plan = c._segments("all_reduce", x, keys, sizes, ndims, None, Role.GRADIENT, factor=1.0)
        assert sorted(place for m in plan.messages for place in m.segments) == [0, 1, 2, 3]
        c.all_reduce_segments(x, keys, sizes, ndims).wait()
        return x

    results = on_ranks(3, Policy(rules), body)
    total = sum(torch.cat([data(r, 2 * 640, 0), data(r, 2 * 640, 1)]) for r in range(3))
    close = 1e-6 if "fp32" in scheme else 0.03
    for x in results:
        assert torch.equal(x, results[0])
        assert (x - total).norm() <= close * total.norm()
