"""Scheme texts: what parses, what it means, that it round-trips, and how bad ones are refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from commlib.algorithms import CONFIGS, Hierarchical, Native, PowerSGD, Ring, TwoPhase, algorithm
from commlib.codecs import codec
from commlib.feedback import ErrorFeedback, Plain
from commlib.scheme import Role, Scheme, check_dtype, default_round


@pytest.mark.parametrize(
    ("text", "scheme"),
    [
        ("fp32", Scheme(codec("fp32"), Plain(), Native())),
        ("fp32@native", Scheme(codec("fp32"), Plain(), Native())),
        ("fp32@two_phase", Scheme(codec("fp32"), Plain(), TwoPhase())),
        ("bf16", Scheme(codec("bf16"), Plain(), TwoPhase())),
        ("bf16@native", Scheme(codec("bf16"), Plain(), Native())),
        (" int8 ", Scheme(codec("int8"), Plain(), TwoPhase())),
        ("int4:block=64+ef", Scheme(codec("int4:block=64"), ErrorFeedback(), TwoPhase())),
        ("int8@ring", Scheme(codec("int8"), Plain(), Ring())),
        (
            "int4+ef:beta=0.9:dtype=bf16@two_phase:slices=4",
            Scheme(codec("int4"), ErrorFeedback(beta=0.9, dtype="bf16"), TwoPhase(slices=4)),
        ),
        (
            "int2+ef@two_phase:back=(int4:block=64):slices=2",
            Scheme(codec("int2"), ErrorFeedback(), TwoPhase(codec("int4:block=64"), 2)),
        ),
        ("int2@two_phase:back=int4", Scheme(codec("int2"), Plain(), TwoPhase(codec("int4")))),
        ("int4+ef@hierarchical", Scheme(codec("int4"), ErrorFeedback(), Hierarchical())),
        (
            "sign@hierarchical:inner=(int8:block=64)",
            Scheme(codec("sign"), Plain(), Hierarchical(codec("int8:block=64"))),
        ),
        ("fp32+ef@power_sgd", Scheme(codec("fp32"), ErrorFeedback(), PowerSGD())),
        ("fp16@power_sgd:rank=4", Scheme(codec("fp16"), Plain(), PowerSGD(4))),
        (
            "bf16+ef@power_sgd:rank=2:min_rate=10",
            Scheme(codec("bf16"), ErrorFeedback(), PowerSGD(2, min_rate=10)),
        ),
    ],
)
def test_a_text_means_a_scheme(text: str, scheme: Scheme) -> None:
    assert Scheme.parse(text) == scheme
    assert Scheme.parse(str(scheme)) == scheme


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("fp32@native", "fp32"),
        ("int8@two_phase", "int8"),
        ("bf16@native", "bf16@native"),
        ("int4+ef:beta=1.0", "int4+ef"),
        ("int2@two_phase:slices=2:back=(int4)", "int2@two_phase:back=int4:slices=2"),
    ],
)
def test_the_text_is_canonical(text: str, canonical: str) -> None:
    assert str(Scheme.parse(text)) == canonical


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["scheme text is empty", "int8+ef"]),
        ("int9", ["scheme 'int9'", "codec 'int9'", "int8"]),
        ("itn4+ef", ["codec 'itn4'", "int4"]),
        ("int4:blok=64", ["'int4:blok=64'", "blok", "block"]),
        ("int8+eff", ["feedback 'eff'", "allowed: ef"]),
        ("int8+", ["no feedback after '+'"]),
        ("int4+ef:bta=0.9", ["ef: option 'bta=0.9'", "did you mean 'beta'"]),
        ("int8@two_phas", ["algorithm 'two_phas'", "native, two_phase, hier", "'two_phase'?"]),
        ("int8@hierarchic", ["algorithm 'hierarchic'", "did you mean 'hierarchical'?"]),
        ("int8@", ["algorithm ''", "native, two_phase, hierarchical, ring"]),
        ("int8@ring+ef", ["feedback stands before the algorithm"]),
        ("int8@ring:slices=2", ["ring takes no options", "slices=2"]),
        ("int8@two_phase:slice=2", ["unknown option 'slice'", "did you mean 'slices'"]),
        ("int8@two_phase:slices", ["has no value", "slices=VALUE"]),
        ("int8@two_phase:slices=two", ["slices is 'two'", "whole number"]),
        ("int8@two_phase:slices=0", ["slices is 0", "allowed: 1 to 1024"]),
        ("int8@hierarchical:slices=0", ["hierarchical: slices is 0", "allowed: 1 to 1024"]),
        ("int8@hierarchical:inner=bf61", ["hierarchical: inner", "did you mean 'bf16'?"]),
        ("int8@hierarchical:back=int4", ["unknown option 'back'", "inner, slices"]),
        ("int8:block=32:block=64", ["'block' is given twice"]),
        ("rotate:seed=1.5|int4", ["seed=1.5", "0 to 2^64 - 1"]),
        ("qsgd:levels=7.0", ["levels=7.0", "1 .. 127"]),
        ("int8@two_phase:slices=2:slices=3", ["'slices' is given twice"]),
        ("int8@two_phase:back=int99", ["two_phase: back", "int99"]),
        ("int8@native", ["the network cannot add int8", "two_phase or ring"]),
        ("int8+ef@power_sgd", ["int8@power_sgd", "fp32, fp16 and bf16"]),
        ("fp32+ef:beta=0.9@power_sgd", ["+ef:beta=0.9@power_sgd", "fp32+ef without options"]),
        ("fp32+ef:dtype=bf16@power_sgd", ["residual", "fp32+ef without options, or fp32 alone"]),
        ("fp32+delta@power_sgd", ["+delta@power_sgd", "fp32+ef without options"]),
        ("fp32+ef@power_sgd:rank=0", ["power_sgd: rank is 0", "allowed: 1 to 256"]),
        ("fp32+ef@power_sgd:rank=257", ["power_sgd: rank is 257", "allowed: 1 to 256"]),
        ("fp32+ef@power_sgd:min_rate=0", ["min_rate is 0", "allowed: 1 and more"]),
        ("fp32+ef@power_sgd:rang=2", ["unknown option 'rang'", "did you mean 'rank'?"]),
        ("fp32+ef@powersgd", ["algorithm 'powersgd'", "did you mean 'power_sgd'?"]),
    ],
)
def test_a_bad_text_is_refused_with_the_part(text: str, words: list[str]) -> None:
    with pytest.raises(ValueError, match="scheme") as caught:
        Scheme.parse(text)
    for word in words:
        assert word in str(caught.value)


def test_what_is_no_text_is_refused() -> None:
    with pytest.raises(ValueError, match=r"text such as 'int8\+ef', or a Scheme, got 8"):
        Scheme.parse(8)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="text such as 'int4:block=64', got 8"):
        codec(8)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "text",
    [
        "ternary+ef",
        "int2:round=stochastic+ef",
        "int2:round=stochastic+ef:beta=0.9",
        "int4+ef@two_phase:back=ternary",  # the owner's side feeds back too
    ],
)
def test_feedback_that_diverges_is_refused_with_the_numbers(text: str) -> None:
    with pytest.raises(ValueError, match=r"\d") as caught:
        Scheme.parse(text)
    assert text in str(caught.value)


def test_feedback_is_checked_without_text_too() -> None:
    with pytest.raises(ValueError, match="ternary"):
        Scheme(codec("ternary"), ErrorFeedback())
    Scheme(codec("ternary"))  # and only the feedback is at fault


def test_repr_is_the_constructor_call() -> None:
    import commlib.codecs
    import commlib.scheme

    scheme = Scheme.parse("int4:block=64+ef:beta=0.9@two_phase:back=int8:slices=3")
    names = {**vars(commlib.scheme), "ErrorFeedback": ErrorFeedback}
    names |= vars(commlib.codecs)
    assert eval(repr(scheme), names) == scheme


# floats as short decimals: what a user writes, and exact in text
numbers = st.integers(1, 100).map(lambda n: n / 100)
codecs = st.sampled_from(
    ["fp32", "fp16", "bf16", "fp8", "int8", "int7:block=32", "int5:round=stochastic",
     "int4:block=64:round=nearest", "int3", "sign", "qsgd:levels=4:norm=l2", "natural"]
).map(codec)  # fmt: skip
feedbacks = st.one_of(
    st.just(Plain()),
    # omega * alpha = beta and small: stable with every codec above
    numbers.map(lambda a: ErrorFeedback(alpha=1.0, beta=a / 100, omega=a / 100, dtype="bf16")),
)
backs = st.none() | codecs
configs = st.one_of(
    st.none(),
    st.just(Ring()),
    st.builds(TwoPhase, backs, st.none() | st.integers(1, 64)),
    st.builds(Hierarchical, backs, st.none() | st.integers(1, 64)),
)


@settings(deadline=None)
@given(codecs, feedbacks, configs)
def test_text_round_trips(c: object, memory: object, config: object) -> None:
    scheme = Scheme(c, memory, config)  # type: ignore[arg-type]
    again = Scheme.parse(str(scheme))
    assert again == scheme
    assert hash(again) == hash(scheme)
    assert str(again) == str(scheme)


@settings(deadline=None)
@given(st.text(alphabet="int4ef+@:=()|.bck8 ring", max_size=24))
def test_any_text_is_a_scheme_or_a_value_error(text: str) -> None:
    try:
        scheme = Scheme.parse(text)
    except ValueError:
        return
    assert Scheme.parse(str(scheme)) == scheme


@pytest.mark.parametrize(
    ("text", "role", "rounding"),
    [
        ("int4+ef", Role.GRADIENT, "nearest"),
        ("int4", Role.GRADIENT, "stochastic"),
        ("int4", Role.ACTIVATION, "nearest"),
        ("int4", Role.ACTIVATION_GRADIENT, "nearest"),
        ("int4", Role.PARAMETER, "nearest"),
        ("int4:round=nearest", Role.GRADIENT, "nearest"),
        ("int8:round=stochastic+ef", Role.GRADIENT, "stochastic"),
        ("int4:round=stochastic", Role.ACTIVATION, "stochastic"),
    ],
)
def test_rounding_is_chosen_where_the_user_did_not(text: str, role: Role, rounding: str) -> None:
    resolved = Scheme.parse(text).resolve(role)
    assert resolved.codec.round == rounding
    assert resolved.resolve(role) == resolved
    assert Scheme.parse(str(resolved)) == resolved


def test_the_way_back_is_rounded_by_the_same_rule() -> None:
    scheme = Scheme.parse("int2@two_phase:back=int4").resolve(Role.GRADIENT)
    assert isinstance(scheme.algorithm, TwoPhase)
    assert scheme.algorithm.back == codec("int4:round=stochastic")


def test_what_travels_inside_a_host_is_rounded_as_without_memory() -> None:
    scheme = Scheme.parse("int4+ef@hierarchical:inner=int8").resolve(Role.GRADIENT)
    assert isinstance(scheme.algorithm, Hierarchical)
    assert scheme.codec == codec("int4:round=nearest")
    assert scheme.algorithm.inner == codec("int8:round=stochastic")


def test_what_knows_no_hosts_goes_by_the_codec_s_default() -> None:
    assert Scheme.parse("int4+ef@hierarchical:inner=bf16").flat() == Scheme.parse("int4+ef")
    assert Scheme.parse("fp32@hierarchical").flat() == Scheme.parse("fp32")
    assert Scheme.parse("int4+ef@ring").flat() == Scheme.parse("int4+ef@ring")


def test_one_rule_decides() -> None:
    assert default_round(Plain(), Role.GRADIENT) == "stochastic"
    assert default_round(ErrorFeedback(beta=0.9), Role.GRADIENT) == "nearest"


def test_a_codec_without_rounding_is_left_alone() -> None:
    for text in ("fp32", "bf16", "bf16@native"):
        assert Scheme.parse(text).resolve() == Scheme.parse(text)


def test_lossless_is_the_library_s_own_collective_only() -> None:
    assert Scheme.parse("fp32").lossless
    for text in ("fp32@two_phase", "fp32@hierarchical", "fp32@ring", "bf16@native", "int8"):
        assert not Scheme.parse(text).lossless


def test_stateless_drops_the_memory_alone() -> None:
    scheme = Scheme.parse("int4+ef@ring")
    assert scheme.stateless() == Scheme.parse("int4@ring")
    assert Scheme.parse("fp16+ef@power_sgd").stateless() == Scheme.parse("fp16")
    assert Scheme.parse("fp32@power_sgd").stateless().lossless
    assert Scheme.parse("int4").stateless() == Scheme.parse("int4")


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.float64])
def test_an_explicit_lossy_scheme_refuses_other_dtypes(dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=r"'int8\+ef'.*float32, float16, bfloat16.*fp32") as caught:
        check_dtype(Scheme.parse("int8+ef"), dtype)
    assert str(dtype) in str(caught.value)
    check_dtype(Scheme.parse("fp32"), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_dtypes_that_codecs_take_pass(dtype: torch.dtype) -> None:
    check_dtype(Scheme.parse("int8+ef"), dtype)


def test_every_algorithm_has_a_text() -> None:
    for name, cls in CONFIGS.items():
        assert algorithm(name) == cls()
        assert str(cls()) == name


def test_role_is_its_text_and_its_repr_is_python() -> None:
    assert f"{Role.ACTIVATION_GRADIENT}" == "activation_gradient"
    assert [eval(repr(role)) for role in Role] == list(Role)
