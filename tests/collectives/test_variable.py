"""Payloads of any size: the same bits as with a fixed size, fewer bytes, and nobody is believed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from commlib.boundary import Boundary
from commlib.codecs import codec
from commlib.collectives import (
    ALGORITHMS,
    Pool,
    all_gather,
    all_to_all,
    broadcast,
    drive,
    reduce_scatter,
    variable,
)
from commlib.collectives.p2p import Mail
from commlib.communicator import Communicator
from commlib.feedback import Compressor, ErrorFeedback, Plain
from commlib.scheme import Scheme
from commlib.topology import Link, Topology
from commlib.traffic import Pending, Through, Transport
from commlib.transport import ThreadTransport, run_ranks
from commlib_kernels.layout import Layout
from tests.communicators import data, on_ranks, only

N = 30_000


def compressor(text: str, rank: int) -> Compressor:
    memory: Any = ErrorFeedback() if text.endswith("+ef") else Plain()
    return Compressor(codec(text.removesuffix("+ef")), memory, seed=5, rank=rank)


def reduced(t: Transport, text: str, x: torch.Tensor, **how: Any) -> torch.Tensor:
    """Of some steps."""
    c, pool, seen = compressor(text, t.rank), Pool(t.device), []
    if "back" in how:
        how["back"] = compressor(how["back"], t.rank)
    for step in range(how.pop("steps", 1)):
        y = x * (step + 1)
        run = ALGORITHMS["two_phase"].run
        drive(run(y, t, c, ("a", "b"), Layout((2 * N // 3, N // 3)), pool, factor=0.5, **how))
        seen.append(y)
    return torch.cat(seen)


def scattered(t: Transport, text: str, x: torch.Tensor) -> torch.Tensor:
    out, rows = torch.empty(N), x.repeat(t.size)
    drive(reduce_scatter(out, rows, t, compressor(text, t.rank), "x", Layout((N,)), Pool(t.device)))
    return out


def gathered(t: Transport, text: str, x: torch.Tensor) -> torch.Tensor:
    out = torch.ones(t.size * N)
    c, pool = compressor(text.removesuffix("+ef"), t.rank), Pool(t.device)
    for add in (False, True):
        drive(all_gather(out, x, t, c, "x", Layout((N,)), pool, slices=3, add=add))
    return out


def exchanged(t: Transport, text: str, x: torch.Tensor) -> torch.Tensor:
    out, rows = torch.empty(t.size * N), x.repeat(t.size)
    c = compressor(text.removesuffix("+ef"), t.rank)
    drive(all_to_all(out, rows, t, c, None, Pool(t.device)))
    return out


def spread(t: Transport, text: str, x: torch.Tensor) -> torch.Tensor:
    y = x.clone()
    drive(broadcast(y, 1, t, compressor(text.removesuffix("+ef"), t.rank), None, Pool(t.device)))
    return y


def both(
    size: int, text: str, body: Callable[..., torch.Tensor], **how: Any
) -> tuple[list[torch.Tensor], list[torch.Tensor], float]:
    """Results of all ranks with and without entropy; bytes sent with it, of those without."""

    def rank(t: ThreadTransport) -> tuple[torch.Tensor, torch.Tensor, int, int]:
        name, plus, memory = text.partition("+")
        squeezed = body(t, f"{name}|entropy{plus}{memory}", data(t.rank, N), **dict(how))
        sent = t.bytes_sent
        plain = body(t, text, data(t.rank, N), **dict(how))
        return squeezed, plain, sent, t.bytes_sent - sent

    rows = run_ranks(size, rank)
    sent, fixed = (sum(row[place] for row in rows) for place in (2, 3))
    return [row[0] for row in rows], [row[1] for row in rows], sent / fixed


@pytest.mark.parametrize("size", [2, 3, 7])
@pytest.mark.parametrize("body", [reduced, scattered, gathered, exchanged, spread])
def test_the_same_bits_in_fewer_bytes(body: Callable[..., torch.Tensor], size: int) -> None:
    """int4 of normal data needs 3.5 of its 4.125 bits; of short payloads the table costs most."""
    squeezed, plain, share = both(size, "int4+ef", body)
    assert all(torch.equal(a, b) for a, b in zip(squeezed, plain, strict=True))
    assert 0.8 < share < 0.97


@pytest.mark.parametrize("text", ["int4+ef", "int3:round=stochastic", "fp32"])
def test_over_steps_and_in_slices(text: str) -> None:
    """Residuals, random numbers and slices are those without."""
    whole, plain, _ = both(3, text, reduced, steps=3, slices=1)
    cut, _, _ = both(3, text, reduced, steps=3, slices=4)
    for outs in (whole, cut):
        assert all(torch.equal(a, b) for a, b in zip(outs, plain, strict=True))


@pytest.mark.parametrize(("first", "second"), [("int8|entropy", "int4"), ("int8", "int4|entropy")])
def test_one_half_alone(first: str, second: str) -> None:
    def rank(t: ThreadTransport) -> list[tuple[torch.Tensor, int]]:
        found = []
        for here, back in ((first, second), ("int8", "int4")):
            before = t.bytes_sent
            found.append((reduced(t, here, data(t.rank, N), back=back), t.bytes_sent - before))
        return found

    for (squeezed, sent), (plain, fixed) in run_ranks(2, rank):
        assert torch.equal(squeezed, plain)
        assert sent < 0.98 * fixed


class Liar(Through):
    """Another rank's number `which`, of those that arrive, is another one."""

    def __init__(self, inner: Transport, change: Callable[[int], int], which: int = 0) -> None:
        super().__init__(inner)
        self._change, self._left = change, which

    def all_to_all(
        self,
        out: torch.Tensor,
        inp: torch.Tensor,
        *,
        out_splits: Sequence[int] | None = None,
        in_splits: Sequence[int] | None = None,
    ) -> Pending:
        pending = super().all_to_all(out, inp, out_splits=out_splits, in_splits=in_splits)
        self._lie(pending, out)
        return pending

    def all_gather(self, out: torch.Tensor, inp: torch.Tensor) -> Pending:
        pending = super().all_gather(out, inp)
        self._lie(pending, out)
        return pending

    def _lie(self, pending: Pending, out: torch.Tensor) -> None:
        if out.numel() == 8 * self.size:
            self._left -= 1
            if self._left == -1:
                pending.wait()
                numbers = out.view(torch.int64)
                numbers[1] = self._change(int(numbers[1]))


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("change", [lambda n: 1 << 60, lambda n: -16, lambda n: n + 8, lambda n: 0])
def test_a_size_that_cannot_be_is_refused(change: Callable[[int], int], which: int) -> None:
    """Before a buffer is made or anything is waited for."""

    def rank(t: ThreadTransport) -> None:
        with pytest.raises(RuntimeError, match=r"rank 1 announced a payload of -?[0-9]+ bytes"):
            reduced(Liar(t, change, which), "int4|entropy", data(t.rank, N))

    run_ranks(2, rank)


def test_a_payload_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes fit, but what arrives is not what a coder wrote."""
    send = variable._gather

    def damaged(transport: Any, slot: Any, codec: Any, pool: Any) -> Any:
        slot.wire[:16] = 255
        return send(transport, slot, codec, pool)

    monkeypatch.setattr(variable, "_gather", damaged)

    def rank(t: ThreadTransport) -> None:
        with pytest.raises(RuntimeError, match="squeezed payload 0 says it has"):
            reduced(t, "int4|entropy", data(t.rank, N))

    run_ranks(2, rank)


@pytest.mark.parametrize("text", ["int4|entropy", "int8@two_phase:back=(int4|entropy)"])
def test_the_cost_formula_is_about_what_is_sent(text: str) -> None:
    scheme, layout, size = Scheme.parse(text), Layout((2 * N // 3, N // 3)), 3
    config: Any = scheme.algorithm
    how = {} if config.back is None else {"back": str(config.back)}

    def rank(t: ThreadTransport) -> int:
        reduced(t, str(scheme.codec), data(t.rank, N), **how)
        return t.bytes_sent

    topology = Topology(size, Link(1e-4, 1e8))
    row = ALGORITHMS["two_phase"]
    for sent in run_ranks(size, rank):
        assert sent == pytest.approx(row.wire_bytes(layout, scheme, topology), rel=0.08)
    fixed = Scheme.parse(str(scheme).replace("|entropy", ""))
    assert row.wire_bytes(layout, scheme, topology) < row.wire_bytes(layout, fixed, topology)


@pytest.mark.parametrize("check", ["0", "1"])
def test_a_communicator_counts_what_was_sent(check: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All-reduce with `int4|entropy+ef` is that with `int4+ef`, with fewer bytes in the table."""
    monkeypatch.setenv("COMMLIB_CHECK", check)

    def body(c: Communicator) -> tuple[torch.Tensor, int, int]:
        for step in range(3):
            x = data(c.rank, N, step)
            c.all_reduce(x, "w", factor="avg")
        return x, c.meter.rows()[0]["wire_bytes"], c.transport.bytes_sent

    runs = [on_ranks(3, only(text), body) for text in ("int4|entropy+ef", "int4+ef")]
    for (mine, sent, counted), (plain, fixed, _) in zip(*runs, strict=True):
        assert torch.equal(mine, plain)
        assert 0.8 < sent / fixed < 0.95
        assert counted >= sent


def test_what_needs_known_sizes_refuses_by_name() -> None:
    known = "needs messages whose size is known before they are coded; use int4"
    for text in (
        "int4|entropy@ring",
        "int4|entropy@hierarchical",
        "int8@hierarchical:inner=(int4|entropy)",
    ):
        with pytest.raises(ValueError, match=known):
            Scheme.parse(text)
    with pytest.raises(ValueError, match=r"slices=600 needs .* or slices=512 or fewer"):
        Scheme.parse("int4|entropy@two_phase:slices=600")
    t = ThreadTransport.world(1)[0]
    with pytest.raises(ValueError, match=f"from one rank to another {known}$"):
        Mail(t).isend(torch.zeros(64), 0, compressor("int4|entropy", 0))
    with pytest.raises(ValueError, match=f"between pipeline stages {known}$"):
        Boundary("x", Scheme.parse("int4|entropy"), (2, 64), torch.float32)
    c = Communicator(t, only("int4|entropy"))
    with pytest.raises(ValueError, match=f"all_to_all of parts {known}, or equal parts"):
        c.all_to_all(torch.zeros(64), torch.zeros(64), out_splits=[64], in_splits=[64])
    c.close()
