"""Modes of boundaries as values: texts, what is refused, and which codecs go with references."""

from __future__ import annotations

import math

import pytest
import torch

from commlib import Scheme
from commlib.codecs import codec
from commlib.modes import OF_PIPELINES, RUNAWAY, Delta, Lep, Reuse, feedback
from commlib_kernels import Layout, Tag


@pytest.mark.parametrize(
    ("text", "mode"),
    [
        ("delta", Delta()),
        ("delta:store=device", Delta(store="device")),
        ("delta:cap=512MiB", Delta(cap="512MiB")),
        (
            "delta:store=disk:cap=8GiB:folder=/scratch/a-b_c+d",
            Delta("disk", "8GiB", "/scratch/a-b_c+d"),
        ),
        ("delta:raw=2", Delta(raw=2)),
        ("reuse", Reuse()),
        ("reuse:first=coded", Reuse("coded")),
        ("lep", Lep()),
        ("lep:dtype=int8", Lep("int8")),
    ],
)
def test_a_text_means_a_mode(text: str, mode: Delta | Reuse | Lep) -> None:
    assert feedback(text) == mode
    assert str(mode) == text
    assert Scheme.parse(f"int4+{text}").feedback == mode
    assert Scheme.parse(str(Scheme.parse(f"int4:block=64+{text}"))).feedback == mode
    assert isinstance(mode, OF_PIPELINES)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("delat", r"'delat' does not exist; allowed: ef, delta, reuse, lep; did you mean 'delta'"),
        ("delta:stoer=host", r"delta: option 'stoer=host'; allowed: .*; did you mean 'store'"),
        ("delta:store", "delta: option 'store'; allowed: store, cap, folder, raw"),
        ("delta:raw=0", "delta: raw=0; allowed: 1 or more visits"),
        ("delta:raw=1.5", "delta: raw='1.5'; allowed: a whole number"),
        ("delta:store=tape", "delta: store='tape'; allowed: device, host, disk"),
        ("delta:cap=1GB", "delta: cap='1GB'; allowed: such as 512MiB"),
        ("delta:cap=", "delta: cap=''"),
        ("delta:cap=-1", "delta: cap='-1'"),
        ("delta:cap=0MiB", "delta: cap='0MiB'; allowed: at least one byte"),
        ("delta:cap=1KiB:cap=2KiB", "delta: option 'cap' is given twice"),
        ("delta:folder=/tmp", "folder='/tmp' needs store=disk, not host"),
        ("delta:store=disk:folder=a@b", "folder='a@b'; allowed: a path without"),
        ("reuse:first=half", "reuse: first='half'; allowed: raw, coded"),
        ("reuse:fresh_prob=0.5", "reuse: option 'fresh_prob=0.5'; allowed: first"),
        ("lep:dtype=fp8", "lep: dtype='fp8'; allowed: fp32, bf16, int8"),
    ],
)
def test_bad_texts_are_refused_with_what_is_allowed(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        feedback(text)


def test_a_folder_that_no_text_carries_is_refused() -> None:
    for folder in ("/a:b", "/a(b)", " /a", "/a "):
        with pytest.raises(ValueError, match="allowed: a path without"):
            Delta("disk", folder=folder)


def test_caps_are_bytes() -> None:
    sizes = {"1": 1, "1000": 1000, "3KiB": 3 << 10, "512MiB": 512 << 20, "8GiB": 8 << 30}
    assert {text: Delta(cap=text).cap_bytes for text in sizes} == sizes
    assert Delta(cap="2TiB").cap_bytes == 2 << 40
    assert Delta(cap=1000) == Delta(cap="1000")  # type: ignore[arg-type]


def error_after(text: str, visits: int) -> float:
    """|a - m|^2 / |a|^2 of Gaussian vectors after so many visits of the same one."""
    c, layout = codec(text), Layout((4096,))
    a = torch.randn(4096, generator=torch.Generator().manual_seed(1))
    m, wire = torch.zeros(4096), torch.zeros(c.nbytes(layout), dtype=torch.uint8)
    for visit in range(visits):
        tag = Tag(0, 1, visit, 0)
        c.encode(a - m, wire, layout, tag)
        c.decode(wire, m, layout, tag, add=True)
    return float((a - m).square().sum() / a.square().sum())


@pytest.mark.parametrize("mode", ["delta", "reuse"])
@pytest.mark.parametrize(
    ("text", "refused"),
    [
        ("qsgd", True),
        ("qsgd:block=512", True),
        ("qsgd:levels=1:block=32", True),
        ("qsgd:block=64", False),
        ("qsgd:levels=127", False),
        ("qsgd:levels=1:norm=max", False),
        ("int2:round=stochastic:block=32", False),
        ("int2:round=stochastic:block=512", False),
        ("int3:round=stochastic:block=4096", False),
        ("ternary", False),
        ("sign", False),
        ("int2:round=nearest:block=4096", False),
        ("natural", False),
    ],
)
def test_what_is_refused_runs_away_and_nothing_else_does(
    text: str, refused: bool, mode: str
) -> None:
    grown = error_after(text, 60)
    assert (grown > 1) == refused, grown
    if refused:
        with pytest.raises(ValueError, match=rf"{text}\+{mode} diverges: .* gamma .* {RUNAWAY}"):
            Scheme.parse(f"{text}+{mode}")
    else:
        assert Scheme.parse(f"{text}+{mode}").codec == codec(text)


def test_one_scale_per_tensor_is_judged_by_its_size() -> None:
    scheme = Scheme.parse("qsgd:block=tensor+delta")
    assert math.isinf(scheme.codec.gamma())
    scheme.feedback.check(scheme.codec, 64)
    with pytest.raises(ValueError, match=r"diverges: .* it is 16\.1 for"):
        scheme.feedback.check(scheme.codec, 4096)


def test_lep_is_refused_where_its_residual_grows() -> None:
    with pytest.raises(ValueError, match="gamma"):
        Scheme.parse("ternary+lep")
    assert Scheme.parse("sign+lep").feedback == Lep()
