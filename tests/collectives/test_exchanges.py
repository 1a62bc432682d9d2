"""reduce_scatter, all_gather, all_to_all, broadcast, and the pool."""

from __future__ import annotations

import pytest
import torch

from commlib.codecs import codec
from commlib.collectives import (
    Pool,
    all_gather,
    all_to_all,
    all_to_all_split,
    broadcast,
    drive,
    raw_reduce_scatter,
    reduce_scatter,
)
from commlib.collectives.pool import size_class
from commlib.feedback import Compressor
from commlib.transport import ThreadTransport, run_ranks
from commlib_kernels.layout import Layout

SIZES = (1, 2, 3, 7)
CODECS = ("fp32", "bf16", "int8", "int4:round=stochastic", "sign:block=tensor")
CODECS += ("int8|entropy", "fp32|entropy", "rotate|int8", "topk:density=0.9|rotate|int8")
# largest error as a fraction of the largest value
STEP = {"fp32": 0.0, "bf16": 2**-8, "int8": 0.5 / 127, "int4:round=stochastic": 1 / 7}
STEP |= {"int8|entropy": 0.5 / 127, "fp32|entropy": 0.0}
# Every element becomes the mean magnitude, which is between nothing and the largest.
STEP |= {"sign:block=tensor": 1.0}
# 128 errors of half a step meet in one with random signs: 4 steps have a chance of 2 exp(-32), and
# the largest rotated value is hardly 1.5 times the largest; a tenth of a normal vector is small.
STEP |= {"rotate|int8": 6 / 127, "topk:density=0.9|rotate|int8": 6 / 127 + 0.1}


def data(size: int, numel: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(numel)
    return [torch.randn(numel, generator=generator) for _ in range(size)]


def near(got: torch.Tensor, want: torch.Tensor, text: str, top: float) -> bool:
    return bool((got - want).abs().max() <= STEP[text] * 1.02 * top + 1e-6)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("text", CODECS)
@pytest.mark.parametrize("slices", [1, 3])
def test_reduce_scatter(text: str, size: int, slices: int) -> None:
    xs = data(size, size * 301)

    def rank(t: ThreadTransport) -> torch.Tensor:
        out = torch.empty(301)
        compressor = Compressor(codec(text), rank=t.rank)
        layout, cut = Layout((301,)), None if "tensor" in text else slices
        drive(
            reduce_scatter(out, xs[t.rank], t, compressor, None, layout, Pool(t.device),
                           factor=0.5, slices=cut)
        )  # fmt: skip
        return out

    total = 0.5 * torch.stack(xs).double().sum(0).view(size, -1)
    top = 0.5 * sum(x.abs().max().item() for x in xs)
    for r, out in enumerate(run_ranks(size, rank)):
        if size == 1:
            assert torch.equal(out, 0.5 * xs[0])
        else:
            assert near(out, total[r], text, top)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("text", CODECS)
@pytest.mark.parametrize("aliased", [False, True])
def test_all_gather(text: str, size: int, aliased: bool) -> None:
    xs = data(size, 301)

    def rank(t: ThreadTransport) -> torch.Tensor:
        out = torch.zeros(size * 301)
        x = out.view(size, -1)[t.rank].copy_(xs[t.rank]) if aliased else xs[t.rank]
        compressor = Compressor(codec(text), rank=t.rank)
        drive(all_gather(out, x, t, compressor, None, Layout((301,)), Pool(t.device)))
        return out

    outs = run_ranks(size, rank)
    assert all(torch.equal(out, outs[0]) for out in outs)
    want = torch.cat(xs)
    assert near(outs[0], want, "fp32" if size == 1 else text, want.abs().max().item())


def test_all_gather_in_slices_is_the_same() -> None:
    xs = data(3, 5000)

    def rank(t: ThreadTransport) -> list[torch.Tensor]:
        outs = []
        for slices in (1, 4):
            out = torch.zeros(3 * 5000)
            compressor = Compressor(codec("int4:round=stochastic"), rank=t.rank)
            layout = Layout((5000,))
            steps = all_gather(
                out, xs[t.rank], t, compressor, "x", layout, Pool(t.device), slices=slices
            )
            drive(steps)
            outs.append(out)
        return outs

    for whole, cut in run_ranks(3, rank):
        assert torch.equal(whole, cut)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("text", CODECS)
def test_all_to_all(text: str, size: int) -> None:
    xs = data(size, size * 130)

    def rank(t: ThreadTransport) -> torch.Tensor:
        out = torch.empty(size * 130)
        compressor = Compressor(codec(text), rank=t.rank)
        drive(all_to_all(out, xs[t.rank], t, compressor, None, Pool(t.device)))
        return out

    for r, out in enumerate(run_ranks(size, rank)):
        want = torch.cat([x.view(size, -1)[r] for x in xs])
        assert near(out, want, "fp32" if size == 1 else text, want.abs().max().item())


def test_all_to_all_of_unequal_parts_compresses_the_large_ones() -> None:
    """Rank r sends 100 r s elements to rank s; parts from 200 elements on travel as int8."""

    def rank(t: ThreadTransport) -> tuple[torch.Tensor, int]:
        splits = [100 * t.rank * s for s in range(3)]
        x = torch.full((sum(splits),), 1.0 + t.rank)
        out = torch.empty(sum(splits))
        int8 = Compressor(codec("int8"), rank=t.rank)
        steps = all_to_all_split(
            out, x, splits, splits, t, lambda n: int8 if n >= 200 else None, Pool(t.device)
        )
        drive(steps)
        return out, t.bytes_sent

    results = run_ranks(3, rank)
    for r, (out, _) in enumerate(results):
        want = torch.cat([torch.full((100 * r * s,), 1.0 + s) for s in range(3)])
        assert torch.allclose(out, want, rtol=0.01)
    assert 0 < results[1][1] < 400


@pytest.mark.parametrize("text", CODECS)
def test_broadcast_gives_the_source_the_same_bits(text: str) -> None:
    def rank(t: ThreadTransport) -> torch.Tensor:
        x = data(3, 2000)[t.rank]
        compressor = Compressor(codec(text), rank=t.rank)
        drive(broadcast(x, 2, t, compressor, None, Pool(t.device)))
        return x

    outs = run_ranks(3, rank)
    assert all(torch.equal(out, outs[2]) for out in outs)
    want = data(3, 2000)[2]
    assert near(outs[0], want, text, want.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.int64, torch.float64])
def test_raw_reduce_scatter(dtype: torch.dtype) -> None:
    def rank(t: ThreadTransport) -> list[float]:
        out = torch.empty(2, dtype=dtype)
        drive(raw_reduce_scatter(out, torch.arange(6).to(dtype) * (t.rank + 1), t, 1.0))
        return out.tolist()

    assert run_ranks(3, rank) == [[0, 6], [12, 18], [24, 30]]


@torch.no_grad()
def test_the_pool_uses_buffers_again() -> None:
    pool = Pool(torch.device("cpu"))
    first = pool.take(10_000)
    assert first.numel() == 10_000
    address = first.data_ptr()
    pool.give(first)
    assert pool.nbytes() == size_class(10_000)
    again = pool.take(9_900)
    assert again.data_ptr() == address
    assert pool.take(10_000).data_ptr() != address
    pool.give(again)
    pool.clear()
    assert pool.nbytes() == 0


@pytest.mark.parametrize("nbytes", [0, 1, 255, 256, 257, 1000, 4096, 4097, 1 << 20, 12_345_678])
def test_size_classes_waste_little(nbytes: int) -> None:
    size = size_class(nbytes)
    assert size >= nbytes
    assert size <= max(256, 1.125 * nbytes)
    assert size_class(size) == size
