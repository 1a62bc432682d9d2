"""Point to point over threads: what arrives, its bytes, its stamps, and who meets whom."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from commlib import stamp
from commlib.codecs import codec
from commlib.collectives import Mail
from commlib.collectives.base import SLICE_BYTES
from commlib.collectives.p2p import (
    FIRST_TAG,
    LATER,
    MAX_SLICES,
    NUMBERED,
    first_tag,
    later_tag,
    slices,
    wire_bytes,
)
from commlib.feedback import Compressor
from commlib.lane import COMMUNICATORS, EXCHANGES, MARKS, MESSAGES
from commlib.transport import ThreadTransport, run_ranks
from tests.contract import CODECS, DTYPES

BIG = 5_000_001  # as int8: 5 MB of wire, 4 slices


def tensor(numel: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed(seed)).to(dtype)


def through(text: str, x: torch.Tensor) -> torch.Tensor:
    """What a codec makes of a tensor in one piece."""
    compressor, out = Compressor(codec(text)), torch.zeros_like(x)
    cut = slices(x.numel(), x.dtype, compressor.codec)
    compressor.advance(None)
    for layout in cut.layouts:
        wire = torch.zeros(compressor.codec.nbytes(layout), dtype=torch.uint8)
        compressor.compress(None, x, wire, layout)
        compressor.decompress(None, wire, out, layout)
    return out


@pytest.mark.parametrize("text", CODECS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_arrives_is_what_the_codec_makes(text: str, dtype: torch.dtype) -> None:
    sizes = (0, 1, 7, 129, 4097)

    def rank(t: ThreadTransport) -> list[torch.Tensor]:
        mail, c, outs = Mail(t), Compressor(codec(text)), []
        for seed, numel in enumerate(sizes):
            x = tensor(numel, dtype, seed)
            before = t.bytes_sent
            if t.rank == 0:
                mail.isend(x, 1, c).wait()
                assert t.bytes_sent - before == wire_bytes(numel, dtype, c.codec)
            else:
                out = torch.full_like(x, float("nan"))
                mail.irecv(out, 0, c).wait()
                outs.append(out)
        assert mail.outstanding == 0
        return outs

    _, outs = run_ranks(2, rank)
    for seed, (numel, out) in enumerate(zip(sizes, outs, strict=True)):
        if "stochastic" in text or "qsgd" in text or "ternary" in text or text == "natural":
            assert not out.isnan().any()  # the streams of random numbers go on between messages
        else:
            assert torch.equal(out, through(text, tensor(numel, dtype, seed)))


@pytest.mark.parametrize(
    ("text", "count"), [("int8", 4), ("bf16", 8), ("int2", 1), ("sign:block=tensor", 1)]
)
def test_large_messages_in_slices(text: str, count: int) -> None:
    sent = tensor(BIG)
    sizes = slices(BIG, torch.float32, codec(text)).sizes
    assert len(sizes) == count
    assert count == 1 or min(sizes) > SLICE_BYTES

    def rank(t: ThreadTransport) -> torch.Tensor:
        x = sent.clone() if t.rank == 0 else torch.full_like(sent, float("nan"))
        mail, c = Mail(t), Compressor(codec(text))
        if t.rank == 0:
            mail.isend(x, 1, c).wait()
            assert torch.equal(x, sent)  # the sender keeps what it had
        else:
            mail.irecv(x, 0, c).wait()
        return x

    assert torch.equal(run_ranks(2, rank)[1], through(text, sent))


def test_the_number_of_slices_has_a_limit() -> None:
    sizes = slices(200_000_000, torch.float32, codec("int8")).sizes
    assert len(sizes) == MAX_SLICES
    assert sum(sizes) == pytest.approx(200_000_000 * (1 + 2 / 128), rel=1e-4)


@settings(max_examples=30, deadline=None)
@given(numel=st.integers(0, 40_000), text=st.sampled_from(["int4", "int8:block=96", "fp8", "sign"]))
def test_any_size(numel: int, text: str) -> None:
    c, x = Compressor(codec(text)), tensor(numel)

    def rank(t: ThreadTransport) -> torch.Tensor:
        mail, out = Mail(t), torch.full_like(x, float("nan"))
        work = mail.irecv(out, 0, c) if t.rank else mail.isend(x, 1, c)
        work.wait()
        assert t.bytes_sent == (0 if t.rank else wire_bytes(numel, x.dtype, c.codec))
        return out

    assert torch.equal(run_ranks(2, rank)[1], through(text, x))


def test_messages_find_each_other_by_tag_in_any_order() -> None:
    def rank(t: ThreadTransport) -> list[float]:
        mail, c, n = Mail(t), Compressor(codec("int8")), 3_000_000  # two slices each
        xs = [torch.full((n,), float(tag)) for tag in range(1, 5)]
        if t.rank == 0:
            works: list[Any] = [mail.isend(x, 1, c, tag) for tag, x in enumerate(xs)]
        else:
            outs = [torch.empty(n) for _ in xs]
            works = [mail.irecv(outs[tag], 0, c, tag) for tag in (2, 0, 3, 1)]
        for work in reversed(works):
            work.wait()
        return [] if t.rank == 0 else [out.mean().item() for out in outs]

    assert run_ranks(2, rank)[1] == pytest.approx([1.0, 2.0, 3.0, 4.0], rel=1e-2)


def test_many_receives_do_not_keep_a_send_from_leaving() -> None:
    def rank(t: ThreadTransport) -> float:
        mail, c, peer = Mail(t), Compressor(codec("int8")), 1 - t.rank
        outs = [torch.empty(2_500_000) for _ in range(20)]
        receiving = [mail.irecv(out, peer, c) for out in outs]
        sending = [mail.isend(torch.full_like(o, float(k)), peer, c) for k, o in enumerate(outs)]
        for work in [*sending, *reversed(receiving)]:
            work.wait(20)
        assert mail.outstanding == 0
        return sum(abs(out.mean().item() - k) for k, out in enumerate(outs))

    assert max(run_ranks(2, rank)) < 1.0


def test_from_any_source_slices_of_one_message_stay_together() -> None:
    n = 3_000_000  # two slices

    def rank(t: ThreadTransport) -> list[tuple[int, float, float]]:
        mail, c = Mail(t), Compressor(codec("int8"))
        if t.rank:
            works: list[Any] = []
            for k in range(2):
                x = torch.full((n,), 10.0 * t.rank + k)
                works.append(mail.isend(x, 0, c, 7))
            for work in works:
                work.wait(20)
            return []
        outs = [torch.empty(n) for _ in range(4)]
        receiving = [mail.irecv(out, None, c, 7) for out in outs]
        found = []
        for k in (3, 1, 0, 2):  # not in the order in which they were posted
            assert receiving[k].source is None
            receiving[k].wait(20)
            source = receiving[k].source
            assert source is not None
            found.append((source, outs[k][:100].mean().item(), outs[k][-100:].mean().item()))
        return found

    found = run_ranks(3, rank)[0]
    for source, front, back in found:
        assert front == pytest.approx(back, rel=1e-3)
        assert round(front / 10) == source
    assert sorted(round(front) for _, front, _ in found) == [10, 11, 20, 21]


def test_named_receives_after_any_source_ones_with_the_same_tag() -> None:
    def rank(t: ThreadTransport) -> list[float]:
        mail, c, n = Mail(t), Compressor(codec("int8")), 3_000_000
        if t.rank:
            for k in range(3):
                mail.isend(torch.full((n,), float(k + 1)), 0, c).wait(20)
            return []
        outs = [torch.empty(n) for _ in range(3)]
        for out, src in zip(outs, (1, None, 1), strict=True):
            mail.irecv(out, src, c).wait(20)
        return [out.mean().item() for out in outs]

    assert run_ranks(2, rank)[0] == pytest.approx([1.0, 2.0, 3.0], rel=1e-2)


def test_tags_beyond_those_that_are_numbered() -> None:
    """Who takes a new tag for every message does not fill the memory with counts."""

    def rank(t: ThreadTransport) -> list[float]:
        mail, c, n = Mail(t), Compressor(codec("int8")), 3_000_000
        tags = range(NUMBERED, NUMBERED + 6)
        outs = [torch.empty(n) for _ in tags]
        if t.rank == 0:
            works: list[Any] = [
                mail.isend(torch.full((n,), k + 1.0), 1, c, tag) for k, tag in enumerate(tags)
            ]
        else:
            works = [mail.irecv(out, 0, c, tag) for out, tag in zip(outs, tags, strict=True)][::-1]
        for work in works:
            work.wait(20)
        assert len(mail._sent) + len(mail._received) <= 1
        return [out[-1].item() for out in outs]

    assert run_ranks(2, rank)[1] == pytest.approx([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], rel=1e-2)


def test_without_tags_messages_are_counted_by_their_peer() -> None:
    """On NCCL tags say nothing and order is all; every buffer is posted at once."""

    def rank(t: ThreadTransport) -> tuple[int | None, int]:
        t.tagged = False
        mail, c, x = Mail(t), Compressor(codec("int8")), torch.zeros(3_000_000)
        for tag in (0, 1, NUMBERED):
            work: Any = mail.irecv(x, 0, c, tag) if t.rank else mail.isend(x, 1, c, tag)
            posted = len(work._pending)
            work.wait(20)
        return work._number, posted

    assert run_ranks(2, rank) == [(2, 2), (2, 2)]


class Meddler(ThreadTransport):
    """Changes a byte of what it sends: `at` of the slice `which`."""

    which, at = 0, 5

    def send(self, x: torch.Tensor, dst: int, tag: int = 0) -> Any:
        y = x.clone()
        if self.which == 0:
            y[self.at] ^= 1
        self.which -= 1
        return super().send(y, dst, tag)


def meddle(which: int, at: int, numel: int = 3_000_000) -> None:
    def rank(t: ThreadTransport) -> None:
        if t.rank == 0:
            t.__class__ = Meddler
            t.which, t.at = which, at  # type: ignore[attr-defined]
        mail, c, x = Mail(t), Compressor(codec("int8")), torch.ones(numel)
        (mail.irecv(x, 0, c) if t.rank else mail.isend(x, 1, c)).wait(20)

    run_ranks(2, rank)


@pytest.mark.parametrize(
    ("which", "at", "field"),
    [
        (0, 5, "slice 1 of 2: its crc32"),
        (1, 1_400_000, "slice 2 of 2: its crc32"),
        (1, -1, "crc32"),
        (0, -16, "wire version"),
        (0, -12, "scheme digest"),
        (0, -8, "message number"),
    ],
)
def test_a_changed_byte_is_named(which: int, at: int, field: str) -> None:
    with pytest.raises(RuntimeError, match=f"recv from rank 0 of 3000000 float32.*{field}"):
        meddle(which, at)


def test_untouched_bytes_pass() -> None:
    meddle(9, 0)


@pytest.mark.parametrize(
    ("texts", "dtypes"),
    [
        (("fp16", "bf16"), (torch.float32, torch.float32)),
        (("int8:round=nearest", "int8:round=stochastic"), (torch.float32, torch.float32)),
        (("int8", "int8"), (torch.float32, torch.bfloat16)),
    ],
)
def test_a_message_of_another_scheme_or_dtype_is_refused(
    texts: tuple[str, str], dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    def rank(t: ThreadTransport) -> None:
        mail, x = Mail(t), torch.ones(4096, dtype=dtypes[t.rank])
        c = Compressor(codec(texts[t.rank]))
        (mail.irecv(x, 0, c) if t.rank else mail.isend(x, 1, c)).wait(20)

    with pytest.raises(RuntimeError, match=r"scheme digest.*Both ends must name the same"):
        run_ranks(2, rank)


def test_a_message_out_of_its_order_is_refused() -> None:
    def rank(t: ThreadTransport) -> None:
        mail, c, x = Mail(t), Compressor(codec("int8")), torch.ones(4096)
        if t.rank:
            mail.irecv(x, 0, c).wait()
        else:
            mail._sent[1, 0] = 4
            mail.isend(x, 1, c).wait()

    with pytest.raises(RuntimeError, match="message number is 0x4, expected 0x0"):
        run_ranks(2, rank)


def test_messages_of_other_sizes_never_meet() -> None:
    def rank(t: ThreadTransport) -> str:
        mail, c = Mail(t), Compressor(codec("int8"))
        if t.rank == 0:
            mail.isend(torch.ones(200), 1, c)
            return ""
        x = torch.zeros(100)
        with pytest.raises(RuntimeError) as error:
            mail.irecv(x, 0, c).wait(0.2)
        assert (x == 0).all()
        return str(error.value)

    text = run_ranks(2, rank)[1]
    assert "recv from rank 0 of 100 float32 values as int8" in text
    assert "timed out after 0.2 s" in text


def test_a_wait_that_was_too_short_may_be_repeated() -> None:
    def rank(t: ThreadTransport) -> float:
        mail, c, x = Mail(t), Compressor(codec("int8")), torch.ones(3_000_000)
        if t.rank == 0:
            t.barrier()
            mail.isend(2 * x, 1, c).wait()
            return 2.0
        work = mail.irecv(x, 0, c)
        with pytest.raises(RuntimeError, match="timed out"):
            work.wait(0.05)
        assert not work.is_completed()
        t.barrier()
        work.wait(20)
        assert work.is_completed()
        return x.mean().item()

    assert run_ranks(2, rank) == pytest.approx([2.0, 2.0], rel=1e-2)


def test_polling_decodes() -> None:
    def rank(t: ThreadTransport) -> float:
        mail, c, x = Mail(t), Compressor(codec("int8")), torch.ones(3_000_000)
        work: Any = mail.irecv(x, None, c) if t.rank else mail.isend(2 * x, 1, c)
        while not work.is_completed():
            pass
        assert mail.outstanding == 0
        return x.mean().item()

    assert run_ranks(2, rank) == pytest.approx([1.0, 2.0], rel=1e-2)


def test_works_that_nobody_keeps() -> None:
    def rank(t: ThreadTransport) -> tuple[float, int]:
        mail, c, x = Mail(t), Compressor(codec("int8")), torch.zeros(4096)
        if t.rank == 0:
            for k in range(100):
                mail.isend(torch.full((4096,), float(k)), 1, c)
            assert mail.outstanding == 100  # nobody has received yet
            t.barrier()
            t.barrier()
            for _ in range(120):  # those that have arrived are let go of now and then
                mail.isend(x, 1, c)
                t.barrier()
            return x.sum().item(), mail.outstanding
        t.barrier()
        total = 0.0
        for _ in range(100):
            mail.irecv(x, 0, c).wait(20)
            total += x.mean().item()
        t.barrier()
        for _ in range(120):
            mail.irecv(x, 0, c).wait(20)
            t.barrier()
        return total, mail.outstanding

    (_, kept), (total, none) = run_ranks(2, rank)
    assert total == pytest.approx(sum(range(100)), rel=1e-2)
    assert kept < 100
    assert none == 0


@pytest.mark.parametrize("n", [4096, 3_000_000])  # one slice, and two
def test_messages_that_fail_do_not_pile_up(n: int) -> None:
    def rank(t: ThreadTransport) -> tuple[int, int]:
        mail, x, failed = Mail(t), torch.ones(n), 0
        c = Compressor(codec("bf16" if t.rank else "fp16"))
        for _ in range(40):
            work: Any = mail.irecv(x, 0, c) if t.rank else mail.isend(x, 1, c)
            if t.rank:
                with pytest.raises(RuntimeError, match="scheme digest"):
                    work.wait(20)
                failed += 1
            else:
                work.wait(20)
            t.barrier()
        return failed, mail.outstanding

    (_, sent), (failed, kept) = run_ranks(2, rank)
    assert failed == 40
    assert sent == 0
    assert kept == 0 if n == 4096 else kept < 40


def test_what_cannot_be_sent_is_refused_before_it_is() -> None:
    mail, c = Mail(ThreadTransport.world(2)[0]), Compressor(codec("int8"))
    with pytest.raises(ValueError, match=r"recv.*not contiguous"):
        mail.irecv(torch.zeros(64, 64).t(), 1, c)
    with pytest.raises(ValueError, match=r"send: rank 2 is not in this group of 2"):
        mail.isend(torch.zeros(64), 2, c)
    mail.transport.tagged = False
    with pytest.raises(ValueError, match="NCCL does not receive from any source; name src"):
        mail.irecv(torch.zeros(64), None, c)
    assert mail.outstanding == 0
    assert mail.transport.bytes_sent == 0


def test_tags_keep_apart() -> None:
    cut, other = (slices(n, torch.float32, codec("int8")) for n in (4096, 4097))
    lanes = 2 * COMMUNICATORS * MESSAGES * MARKS * EXCHANGES
    firsts = {first_tag(cut, tag) for tag in range(10_000)}
    laters = {later_tag(cut, 3, number) for number in range(10_000)}
    assert len(firsts) == len(laters) == 10_000
    assert lanes <= FIRST_TAG <= min(firsts)
    assert max(firsts) < FIRST_TAG + LATER <= min(laters)
    assert max(laters) + 0x636F6D < 1 << 31  # gloo takes no more, and the transport adds its own
    assert first_tag(cut, 0) != first_tag(other, 0)


def test_stamps() -> None:
    wire = torch.arange(48, dtype=torch.uint8)
    stamp.seal(wire, stamp.digest("int8"), (1 << 32) + 3)
    assert wire[:32].tolist() == list(range(32))
    version, digest, number, crc = stamp.STAMP.unpack(bytes(wire[32:].tolist()))
    assert (version, digest, number) == (stamp.WIRE_VERSION, stamp.digest("int8"), 3)
    assert crc == stamp.crc(wire[:32])
    assert stamp.check(wire, stamp.digest("int8"), 3, "x") == 3
    assert stamp.check(wire, stamp.digest("int8"), None, "x") == 3
    with pytest.raises(RuntimeError, match=r"message 3 from rank 1: its scheme digest is 0x"):
        stamp.check(wire, stamp.digest("int4"), 3, "message 3 from rank 1")
    with pytest.raises(RuntimeError, match=r"its message number is 0x3, expected 0x4 \(48 bytes\)"):
        stamp.check(wire, stamp.digest("int8"), 4, "x")
    wire[0] += 1
    with pytest.raises(RuntimeError, match="crc32"):
        stamp.check(wire, stamp.digest("int8"), 3, "x")
