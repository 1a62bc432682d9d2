"""Policies: rules in order, texts and files, what stays raw, digests."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from commlib.policy import Policy, Role, Rule, Scheme, TensorInfo, raw

EF = Scheme.parse("int4+ef")
MATRIX = TensorInfo("layer.weight", 4096, torch.float32, Role.GRADIENT, ndim=2)


def test_a_scheme_text_keeps_vectors_and_small_tensors_exact() -> None:
    policy = Policy.parse("int4+ef")
    assert policy == Policy((Rule(EF, min_numel=1024, min_ndim=2), Rule(raw())))
    assert policy == Policy.parse(EF)
    assert Policy.parse(policy) is policy
    assert policy.choose(MATRIX) == EF.resolve()
    assert policy.choose(MATRIX._replace(ndim=1)) == raw()
    assert policy.choose(MATRIX._replace(numel=1023)) == raw()
    assert policy.choose(MATRIX._replace(numel=1024)) == EF.resolve()
    assert policy.choose(MATRIX._replace(ndim=None)) == EF.resolve()  # a flat bucket


def test_fp32_is_one_rule() -> None:
    assert Policy.parse("fp32") == Policy((Rule(raw()),))
    assert Policy.parse("fp32").lossless
    assert not Policy.parse("int8").lossless


@pytest.mark.parametrize(
    ("change", "scheme"),
    [
        ({"key": "tok.embed"}, "fp32"),
        ({"key": "tok.embed.deep"}, "fp32"),
        ({"key": "Tok.Embed"}, "int8:round=nearest+ef"),  # patterns know case
        ({"key": "head.weight"}, "int4:round=nearest+ef"),
        ({"key": "head.weight", "step": 9}, "int4:round=nearest+ef"),
        ({"key": "head.weight", "step": 10}, "sign+ef"),
        ({"role": Role.PARAMETER}, "int8:round=nearest"),
        ({"numel": 64, "ndim": 1}, "fp32"),
        ({}, "int8:round=nearest+ef"),
    ],
)
def test_the_first_rule_that_matches_wins(change: dict[str, object], scheme: str) -> None:
    policy = Policy(
        (
            Rule(raw(), key="*.embed*"),
            Rule(Scheme.parse("sign+ef"), key="head.*", from_step=10),
            Rule(Scheme.parse("int8"), role=Role.PARAMETER),
            Rule(EF, key="head.*"),
            Rule(Scheme.parse("int8+ef"), min_numel=65),
        )
    )
    assert str(policy.choose(MATRIX._replace(**change))) == scheme


def test_a_rule_may_ask_for_a_dtype() -> None:
    policy = Policy((Rule(EF, dtype=torch.float32),))
    assert policy.choose(MATRIX) == EF.resolve()
    assert policy.choose(MATRIX._replace(dtype=torch.bfloat16)) == raw()


def test_no_rule_means_raw() -> None:
    assert Policy(()).choose(MATRIX) == raw()
    assert Policy((Rule(EF, key="other"),)).choose(MATRIX) == raw()


def test_an_anonymous_tensor_gets_no_memory_and_no_named_rule() -> None:
    anonymous = MATRIX._replace(key=None)
    assert Policy((Rule(EF),)).choose(anonymous) == Scheme.parse("int4:round=stochastic")
    assert Policy((Rule(EF, key="?*"),)).choose(anonymous) == raw()


def test_an_activation_gets_no_memory() -> None:
    activation = MATRIX._replace(role=Role.ACTIVATION)
    assert Policy((Rule(EF),)).choose(activation) == Scheme.parse("int4:round=nearest")
    with pytest.raises(ValueError, match=r"'activation' takes no error feedback.*'int4'"):
        Rule(EF, role=Role.ACTIVATION)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.bool, torch.float64])
def test_dtypes_that_codecs_do_not_take_travel_raw(dtype: torch.dtype) -> None:
    assert Policy((Rule(EF),)).choose(MATRIX._replace(dtype=dtype)) == raw()


@pytest.mark.parametrize(
    ("text", "numel", "dtype", "smaller"),
    [
        ("int8", 0, torch.float32, False),
        ("int8", 4, torch.float32, False),  # 16 bytes of codes and 16 of scales for 16
        ("int8", 8, torch.float32, False),  # 32 for 32
        ("int8", 9, torch.float32, True),  # 32 for 36
        ("bf16", 4096, torch.float32, True),
        ("bf16", 4096, torch.bfloat16, False),
        ("fp16", 4096, torch.bfloat16, False),
        ("int8", 4096, torch.bfloat16, True),
    ],
)
def test_a_payload_that_would_not_be_smaller_is_raw(
    text: str, numel: int, dtype: torch.dtype, smaller: bool
) -> None:
    info = TensorInfo("w", numel, dtype)
    chosen = Policy((Rule(Scheme.parse(text)),)).choose(info)
    assert chosen == (Scheme.parse(text).resolve() if smaller else raw())


def test_another_algorithm_for_exact_values_is_not_overruled() -> None:
    ring = Scheme.parse("fp32@ring")
    assert Policy((Rule(ring),)).choose(MATRIX) == ring


def test_eras_end_where_a_rule_begins() -> None:
    policy = Policy((Rule(EF, from_step=100), Rule(raw(), key="a", from_step=7), Rule(EF)))
    assert [policy.era(step) for step in (0, 6, 7, 99, 100, 10**6)] == [0, 0, 7, 7, 100, 100]
    assert Policy.parse("int8").era(10**6) == 0


# --- texts and files -----------------------------------------------------------------------------

schemes = st.sampled_from(
    ["fp32", "bf16@native", "int8", "int4:block=64+ef:beta=0.9", "int2@two_phase:back=(int3)"]
).map(Scheme.parse)  # fmt: skip
keys = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=12)
counts = st.integers(0, 2**40)
rules = st.builds(
    Rule,
    schemes,
    key=keys,
    role=st.sampled_from([None, Role.GRADIENT, Role.PARAMETER, Role.OTHER]),
    min_numel=counts,
    min_ndim=st.integers(0, 4),
    from_step=counts,
    dtype=st.sampled_from([None, torch.float32, torch.bfloat16]),
)
policies = st.lists(rules, max_size=4).map(lambda rows: Policy(tuple(rows)))


@settings(deadline=None)
@given(policies)
def test_every_form_round_trips(policy: Policy) -> None:
    import tomllib

    assert Policy.parse(str(policy)) == policy
    assert Policy.parse(policy.to_json()) == policy
    assert Policy.parse(policy.to_dict()) == policy
    assert Policy.parse(tomllib.loads(policy.to_toml())) == policy
    assert Policy.parse(policy.to_json()).digest() == policy.digest()


@settings(deadline=None)
@given(policies, policies)
def test_digests_differ_as_policies_do(a: Policy, b: Policy) -> None:
    assert (a == b) == (a.digest() == b.digest())


def test_the_digest_is_the_same_in_every_process_and_version() -> None:
    # not Python's hash, which is salted per process
    assert Policy.parse("int4+ef").digest() == DIGEST


DIGEST = "210af31af6d4269c"


@pytest.mark.parametrize("name", ["rules.toml", "rules.json"])
def test_files(tmp_path: Path, name: str) -> None:
    policy = Policy((Rule(raw(), key='*"é*'), Rule(EF, role=Role.GRADIENT, min_numel=7)))
    path = tmp_path / name
    text = policy.to_toml() if name.endswith("toml") else policy.to_json()
    path.write_text(text, encoding="utf-8")
    assert Policy.parse(path) == policy
    assert Policy.parse(str(path)) == policy


def test_a_short_text_stays_short() -> None:
    assert str(Policy.parse("int4+ef")) == "int4+ef"
    assert str(Policy.parse("fp32")) == "fp32"
    assert json.loads(str(Policy((Rule(EF),)))) == {"rules": [{"scheme": "int4+ef"}]}


def test_repr_is_the_constructor_call() -> None:
    import commlib.codecs
    import commlib.feedback
    import commlib.policy

    policy = Policy((Rule(EF, role=Role.GRADIENT), Rule(raw(), key="a")))
    names = {**vars(commlib.feedback), **vars(commlib.policy)}
    names |= vars(commlib.codecs)
    assert eval(repr(policy), names) == policy


def test_it_is_a_value_that_copies_and_pickles() -> None:
    policy = Policy.parse("int4+ef")
    policy.choose(MATRIX)
    for again in (copy.deepcopy(policy), pickle.loads(pickle.dumps(policy))):
        assert again == policy
        assert hash(again) == hash(policy)
        assert again.choose(MATRIX) == policy.choose(MATRIX)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("auto", ["'auto'", "measured", "wrap"]),
        ("int9+ef", ["codec 'int9'"]),
        ("", ["empty"]),
        ("{not json", ["policy text is not JSON"]),
        ('{"rules": [{"scheme": "int8", "scheme": "fp32"}]}', ["'scheme' is given twice"]),
        ('{"rules": [{"scheme": "int8"}], "rules": []}', ["'rules' is given twice"]),
        (8, ["a policy is a scheme text", "got 8"]),
        ({"rule": []}, ["unknown policy field 'rule'", "did you mean 'rules'"]),
        ({}, ["rules=None"]),
        ({"rules": "int8"}, ["rules='int8'"]),
        ({"rules": [{"scheme": "int8"}, {"key": "a"}]}, ["rule 2", "needs a scheme"]),
        ({"rules": [{"scheme": "int8", "min_nmel": 3}]}, ["rule 1", "did you mean 'min_numel'"]),
        ({"rules": [{"scheme": 8}]}, ["scheme is 8", "int8+ef"]),
        ({"rules": [{"scheme": "int8", "role": "gradeint"}]}, ["did you mean 'gradient'"]),
        ({"rules": [{"scheme": "int8", "dtype": "float23"}]}, ["did you mean 'float32'"]),
        ({"rules": [{"scheme": "int8", "dtype": "int32"}]}, ["dtype 'int32'", "bfloat16"]),
        ({"rules": [{"scheme": "int8", "dtype": ["float32"]}]}, ["rule 1", "dtype", "bfloat16"]),
        ({"rules": [{"scheme": "int8", "min_numel": -1}]}, ["min_numel is -1"]),
        ({"rules": [{"scheme": "int8", "min_numel": 1.5}]}, ["min_numel is 1.5"]),
        ({"rules": [{"scheme": "int8", "from_step": True}]}, ["from_step is True"]),
        ({"rules": [{"scheme": "int8", "key": ""}]}, ["key is ''"]),
        ({"rules": [{"scheme": "ternary+ef"}]}, ["rule 1", "ternary+ef"]),
    ],
)
def test_a_bad_policy_is_refused_with_the_part(source: object, words: list[str]) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        Policy.parse(source)  # type: ignore[arg-type]
    for word in words:
        assert word in str(caught.value)


def test_a_bad_file_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere\.toml.*cannot be read"):
        Policy.parse(str(tmp_path / "nowhere.toml"))
    path = tmp_path / "rules.toml"
    path.write_text("[[rules]\n")
    with pytest.raises(ValueError, match=r"rules\.toml.*not TOML"):
        Policy.parse(path)
    path.write_text('[[rules]]\nscheme = "int8+eff"\n')
    with pytest.raises(ValueError, match=r"rules\.toml.*rule 1.*feedback 'eff'"):
        Policy.parse(path)
    with pytest.raises(ValueError, match=r"must end in \.toml or \.json"):
        Policy.parse(tmp_path / "rules.yaml")
