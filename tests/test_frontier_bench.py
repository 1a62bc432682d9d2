"""bench.frontier: the line between our codecs, and that a peer that beats it is named."""

from __future__ import annotations

import math

import pytest
import torch

from bench import frontier, peers
from bench.frontier import Row, measure, verdicts
from commlib.codecs import codec


def row(name: str, bits: float, nmse: float, *, peer: bool = False, data: str = "normal") -> Row:
    return Row(data, name, peer, bits, nmse, bits - 0.5 * math.log2(1 / nmse), 1)


POINTS = dict.fromkeys(frontier.GAPS, (3, 0.05))
POINTS |= {"rotate|eden1": (1, 0.3), "rotate|eden2": (2, 0.1), "rotate|eden4": (4, 2.0**-7)}
OURS = [
    row(text, bits, error, data=data)
    for data in ("normal", *frontier.ANY)
    for text, (bits, error) in POINTS.items()
]


def test_between_two_codecs_the_logarithm_of_the_error_is_a_straight_line() -> None:
    rows = [row("a", 2, 2.0**-2), row("b", 6, 2.0**-10), row("worse", 4, 2.0**-5)]
    assert frontier.frontier(rows, 4) == pytest.approx(2.0**-6)
    assert frontier.frontier(rows, 3) == pytest.approx(2.0**-4)
    assert frontier.frontier(rows, 9) == 2.0**-10
    assert frontier.frontier(rows, 1) == math.inf
    whole = Row("normal", "whole", False, 14, 0.0, None, 1)
    assert frontier.frontier([*rows, whole], 10) == pytest.approx(2.0**-11)
    assert frontier.frontier([*rows, whole], 14) == 0


def test_a_peer_that_is_better_misses_a_bar() -> None:
    good, bad = row("peer one", 3, 0.01, peer=True), row("peer two", 3, 0.5, peer=True)
    found = {what: ok for what, _, ok in verdicts([*OURS, good, bad])}
    assert not found["peer one on normal: ours at 3.000 bits no worse"]
    assert found["peer two on normal: ours at 3.000 bits no worse"]
    same = row("peer three", 2, 0.1, peer=True)
    assert verdicts([*OURS, same])[-1][2]


def test_peers_get_every_segment_and_who_fails_is_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def halved(x: torch.Tensor) -> peers.Coded:
        return 3.0 * x.numel() + 32, x / 2

    def broken(x: torch.Tensor) -> peers.Coded:
        raise RuntimeError("no such thing")

    monkeypatch.setattr(frontier, "PEERS", {})
    monkeypatch.setattr(frontier, "OURS", ("int4",))
    monkeypatch.setitem(peers.OPTIONAL, "torchao halved", halved)
    monkeypatch.setitem(peers.OPTIONAL, "divides", lambda x: (8.0, x / 0))
    for label in list(peers.OPTIONAL)[:-2]:
        monkeypatch.setitem(peers.OPTIONAL, label, broken)
    segments = [torch.full((256,), 1e-9), torch.ones(128)]
    mine, theirs = measure("some", segments)
    assert (mine.codec, mine.peer) == ("int4", False)
    assert mine.bits == 8 * codec("int4").nbytes(frontier.Layout((256, 128), align=128)) / 384
    assert (theirs.codec, theirs.peer) == ("torchao halved", True)
    assert theirs.bits == 3 + 64 / 384
    assert theirs.nmse == pytest.approx(0.25)
    said = capsys.readouterr().err
    assert "hivemind Float16 on some: left out, no such thing" in said
    assert "divides on some: left out, decodes to values that are not finite" in said
