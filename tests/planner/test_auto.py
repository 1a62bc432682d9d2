"""The pure half of the planner: prediction, choice, break-even."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from commlib.planner import (
    Curve,
    Profile,
    Speed,
    breakeven,
    breakeven_table,
    choices_table,
    choose,
    policy,
    predict,
)
from commlib.planner.breakeven import speedup
from commlib.policy import Policy, TensorInfo
from commlib.scheme import Scheme
from commlib.topology import Link

KIB, MIB = 1024, 1024 * 1024
GRID = tuple(4 * KIB << k for k in range(13))


def profile(rate: float, codec_rate: float = 1e9, latency: float = 1e-4, size: int = 4) -> Profile:
    """A group that does exactly what the model says: `rate` of the link, `codec_rate` per pass."""
    sent = 2 * (size - 1) / size
    ratios = {"bf16": 0.5, "int8": 0.2539}
    curves = [Curve("fp32", GRID, tuple(latency + sent * n / rate for n in GRID))]
    curves += [
        Curve(s, GRID, tuple(4 * latency + n * (sent * r / rate + 3 / codec_rate) for n in GRID))
        for s, r in ratios.items()
    ]
    speeds = tuple(Speed(s, codec_rate, codec_rate, codec_rate, r) for s, r in ratios.items())
    return Profile(
        size, tuple(curves), speeds, Link(latency, rate), Link(latency, rate), 2 * latency
    )


def test_a_curve_goes_through_its_points_and_straight_between_them() -> None:
    curve = Curve("int8", (100, 200, 400), (1.0, 3.0, 4.0))
    assert [curve.at(n) for n in (100, 200, 400)] == [1.0, 3.0, 4.0]
    assert curve.at(150) == 2.0
    assert curve.at(300) == 3.5
    assert curve.at(800) == 6.0  # the last slope goes on
    assert curve.at(0) == 1.0  # a small message costs what the smallest did


def test_noise_does_not_make_large_messages_free() -> None:
    assert Curve("int8", (100, 200), (3.0, 2.0)).at(10**9) == 3.0
    assert Curve("int8", (100, 200), (3.0, 2.0)).at(150) == 2.5


@pytest.mark.parametrize(
    ("nbytes", "around"),
    [(99, ()), (100, (100, 200)), (150, (100, 200)), (200, (200, 400)), (399, (200, 400)),
     (400, (200, 400)), (10**9, (200, 400))],
)  # fmt: skip
def test_the_measured_sizes_around(nbytes: int, around: tuple[int, ...]) -> None:
    assert Curve("int8", (100, 200, 400), (1.0, 2.0, 3.0)).around(nbytes) == around


@pytest.mark.parametrize(
    ("nbytes", "seconds"), [((100,), (1.0,)), ((100, 100), (1.0, 1.0)), ((100, 200), (1.0,))]
)
def test_curves_that_cannot_be(nbytes: tuple[int, ...], seconds: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="two or more ascending sizes"):
        Curve("int8", nbytes, seconds)


@pytest.mark.parametrize("scheme", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("numel", [4096, 10**6, 10**8])
def test_a_group_of_another_size_is_predicted_by_the_model(scheme: str, numel: int) -> None:
    # the curves follow the model exactly, so measured and modelled seconds must agree
    here = profile(125e6, size=4)
    there = profile(125e6, size=8)
    assert predict(there, scheme, numel, 4) == pytest.approx(predict(here, scheme, numel, 4))


def test_raw_cost_follows_bytes_and_coded_cost_elements() -> None:
    here = profile(125e6)
    double = predict(here, "fp32", 2 * 10**6, 4, torch.bfloat16)
    assert double == predict(here, "fp32", 10**6, 4)
    assert predict(here, "int8", 10**6, 4, torch.bfloat16) == predict(here, "int8", 10**6, 4)


@pytest.mark.parametrize(
    ("rate", "nbytes", "scheme"),
    [
        (25e6, 64 * MIB, "int8"),  # 200 Mbit/s
        (125e6, MIB, "int8"),
        (125e6, 256 * MIB, "int8"),
        (125e6, 4 * KIB, "fp32"),  # latency decides
        (125e6, KIB, "fp32"),  # below what was measured
        (12.5e9, 64 * MIB, "fp32"),  # the codecs are slower than this link
        (12.5e9, 4 * KIB, "fp32"),
    ],
)
def test_it_compresses_where_that_is_faster(rate: float, nbytes: int, scheme: str) -> None:
    assert choose(profile(rate), nbytes // 4, torch.float32, 4) == scheme


def test_bf16_wins_where_int8_is_slow_to_code() -> None:
    slow = profile(1e9, codec_rate=1e10)
    curves = list(slow.curves)
    curves[2] = dataclasses.replace(curves[2], seconds=tuple(5 * t for t in curves[2].seconds))
    slow = dataclasses.replace(slow, curves=tuple(curves))
    assert choose(slow, 10**7, torch.float32, 4) == "bf16"


def test_16_bit_tensors_have_less_to_gain() -> None:
    # bf16 of a bf16 tensor is no smaller; int8 saves half, not three quarters
    fast_codec = profile(125e6, codec_rate=1e10)
    assert choose(fast_codec, 10**7, torch.bfloat16, 4) == "int8"
    no_int8 = dataclasses.replace(fast_codec, speeds=fast_codec.speeds[:1])
    assert choose(no_int8, 10**7, torch.bfloat16, 4) == "fp32"
    assert choose(no_int8, 10**7, torch.float32, 4) == "bf16"
    # where int8 gains a third for fp32 it gains nothing for bf16
    marginal = profile(250e6)
    assert choose(marginal, 10**7, torch.float32, 4) == "int8"
    assert choose(marginal, 10**7, torch.bfloat16, 4) == "fp32"


@pytest.mark.parametrize("dtype", [torch.int32, torch.float64])
def test_dtypes_without_codec_and_lone_ranks_stay_raw(dtype: torch.dtype) -> None:
    assert choose(profile(25e6), 10**7, dtype, 4) == "fp32"
    assert choose(profile(25e6), 10**7, torch.float32, 1) == "fp32"


def test_the_margin_is_demanded() -> None:
    here = profile(125e6)
    gain = predict(here, "fp32", 10**7, 4) / predict(here, "int8", 10**7, 4)
    assert choose(here, 10**7, torch.float32, 4, margin=gain * 0.9 - 1) == "int8"
    assert choose(here, 10**7, torch.float32, 4, margin=gain * 1.1 - 1) == "fp32"
    with pytest.raises(ValueError, match="margin is -1"):
        choose(here, 10**7, torch.float32, 4, margin=-1)


def test_one_lucky_measurement_is_not_enough() -> None:
    fast = profile(12.5e9)  # raw wins everywhere
    lucky = list(fast.curves)
    for place in (1, 2):
        seconds = list(lucky[place].seconds)
        seconds[5] = fast.curves[0].seconds[5] / 10
        lucky[place] = dataclasses.replace(lucky[place], seconds=tuple(seconds))
    fast = dataclasses.replace(fast, curves=tuple(lucky))
    for numel in range(GRID[4] // 4, GRID[6] // 4, 997):
        assert choose(fast, numel, torch.float32, 4) == "fp32"
    assert choose(fast, GRID[5] // 4, torch.float32, 4) == "fp32"


seconds = st.floats(1e-5, 1.0)
random_profiles = st.lists(st.tuples(seconds, seconds, seconds), min_size=5, max_size=5).map(
    lambda rows: dataclasses.replace(
        profile(125e6),
        curves=tuple(
            Curve(s, GRID[:5], column)
            for s, column in zip(("fp32", "bf16", "int8"), zip(*rows, strict=True), strict=True)
        ),
    )
)


@given(random_profiles, st.integers(0, 10**6), st.sampled_from([torch.float32, torch.bfloat16]))
def test_whatever_was_measured_the_choice_is_predicted_faster(
    measured: Profile, numel: int, dtype: torch.dtype
) -> None:
    taken = choose(measured, numel, dtype, 4)
    if taken != "fp32":
        raw = predict(measured, "fp32", numel, 4, dtype)
        assert predict(measured, taken, numel, 4, dtype) * 1.1 < raw


@given(random_profiles, st.integers(0, 4), st.sampled_from([torch.float32, torch.bfloat16]))
def test_the_policy_says_what_choose_says(
    measured: Profile, place: int, dtype: torch.dtype
) -> None:
    numel = GRID[place] // 4
    info = TensorInfo("w", numel, dtype, ndim=2)
    taken = choose(measured, numel, dtype, 4)
    assert policy(measured).choose(info) == Scheme.parse(taken).resolve()
    assert policy(measured).choose(info._replace(ndim=1)).lossless


def test_the_policy_is_short_and_reads_as_text() -> None:
    written = policy(profile(125e6, codec_rate=1e10))
    assert [(r.dtype, str(r.scheme)) for r in written.rules] == [
        (torch.float32, "int8"),
        (torch.float16, "int8"),
        (torch.bfloat16, "int8"),
        (None, "fp32"),
    ]
    assert policy(profile(12.5e9)).lossless
    assert Policy.parse(written.to_json()) == written


def test_break_even_is_where_the_model_crosses() -> None:
    here = profile(125e6)
    for scheme in here.compressing:
        rate = breakeven(here, scheme)
        assert speedup(here, scheme, rate) == pytest.approx(1.0)
        assert speedup(here, scheme, rate / 2) > 1 > speedup(here, scheme, rate * 2)


def test_tables() -> None:
    here = profile(125e6)
    head, _, *rows = breakeven_table(here).splitlines()
    assert "1 Gbit/s" in head
    assert [row.split()[0] for row in rows] == ["bf16", "int8"]
    # 1.5 * (1 - 0.2539) / 3e-9 bytes per second
    assert "2.98 Gbit/s" in rows[1]
    assert f"{speedup(here, 'int8', 12.5e6):.2f}x" in rows[1]
    measured = predict(here, "fp32", 4 * MIB, 4) / predict(here, "int8", 4 * MIB, 4)
    assert rows[1].endswith(f"{measured:.2f}x")
    lines = choices_table(here).splitlines()
    assert len(lines) == 2 + len(GRID)
    assert lines[2].split()[:2] == ["4", "KiB"]
    assert lines[2].endswith("fp32")
    assert lines[-1].endswith("int8")


def test_an_unmeasured_scheme_is_named() -> None:
    with pytest.raises(ValueError, match=r"'int4' was not measured.*fp32, bf16, int8"):
        predict(profile(125e6), "int4", 10, 4)
