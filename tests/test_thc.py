"""THC as a scheme: its text, which tensors it is for, what is refused, what is remembered."""

from __future__ import annotations

import logging
from typing import Any
from unittest import mock

import pytest
import torch

from commlib import Communicator
from commlib.algorithms import Thc
from commlib.capture import Captures
from commlib.codecs import codec
from commlib.collectives import thc
from commlib.feedback import ErrorFeedback, Plain
from commlib.plans import single
from commlib.policy import Policy, TensorInfo
from commlib.reshard import redistribute
from commlib.scheme import Role, Scheme
from commlib.telemetry import typical_error
from commlib.traffic import Transport
from tests.communicators import data, on_ranks, only

EF = "fp32+ef@thc"


def test_texts() -> None:
    assert Scheme.parse("fp32+ef@thc:bits=8") == Scheme(codec("fp32"), ErrorFeedback(), Thc(8))
    assert Scheme.parse("fp32@thc:bits=4") == Scheme(codec("fp32"), Plain(), Thc())
    for text in ("fp32@thc", EF, "fp32+ef@thc:bits=2"):
        scheme = Scheme.parse(text)
        assert str(scheme) == text
        assert not scheme.lossless
        assert scheme.resolve(Role.GRADIENT) == scheme
    assert str(Scheme.parse(EF).stateless()) == "fp32@thc"
    assert Scheme.parse("fp32@thc").flat().lossless


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("int4+ef@thc", ["int4@thc", "codes of its own", "fp32+ef@thc:bits=4"]),
        ("fp16@thc", ["fp16@thc", "cannot be added"]),
        ("fp32+ef:beta=0.9@thc", ["+ef:beta=0.9@thc", "fp32+ef without options"]),
        ("fp32+ef:dtype=bf16@thc", ["fp32+ef without options, or fp32 alone"]),
        ("fp32@thc:bits=3", ["thc: bits is 3", "allowed: 2, 4, 8"]),
        ("fp32@thc:bits=1", ["thc: bits is 1"]),
        ("fp32@thc:bit=4", ["unknown option 'bit'", "did you mean 'bits'?"]),
    ],
)
def test_bad_texts_are_refused(text: str, words: list[str]) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011
        Scheme.parse(text)
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize(
    ("numel", "dtype", "coded"),
    [
        (1024, torch.float32, True),
        (8, torch.float32, True),
        (1, torch.float32, False),
        (0, torch.float32, False),
        (4097, torch.bfloat16, True),
        (4097, torch.float64, False),
    ],
)
def test_which_tensors_it_is_for(numel: int, dtype: torch.dtype, coded: bool) -> None:
    chosen = only(EF).choose(TensorInfo("w", numel, dtype, ndim=2))
    assert isinstance(chosen.algorithm, Thc) == coded
    # and small and exact ones as under every text
    assert Policy.parse(EF).choose(TensorInfo("w", 4096, torch.float32, ndim=1)).lossless
    assert str(only(EF).choose(TensorInfo(None, 4096, torch.float32))) == "fp32@thc"


def test_more_ranks_than_sums_have_room_for() -> None:
    assert thc.sum_dtype(17, 4) is torch.uint8
    assert thc.sum_dtype(18, 4) is torch.int16
    assert thc.sum_dtype(128, 8) is torch.int16
    with pytest.raises(ValueError, match=r"8 bits of 129 ranks add up to 32895.*fewer bits"):
        thc.sum_dtype(129, 8)

    def body(c: Communicator) -> int:
        with pytest.raises(ValueError, match="no room"):
            c.all_reduce(data(c.rank, 4096), "w", scheme=EF)
        return c.transport.bytes_sent

    with mock.patch.object(thc, "sum_dtype", side_effect=ValueError("no room")):
        assert on_ranks(2, "fp32", body) == [0, 0]


def test_a_cuda_graph_cannot_repeat_it() -> None:
    plan = single("all_reduce", Scheme.parse(EF), "w", 4096, torch.float32)
    with pytest.raises(RuntimeError, match=r"\+ef@thc draws its random numbers on the host"):
        Captures().admit(plan, capturing=True, checked=False)


def test_other_collectives_know_no_sums_of_codes(caplog: pytest.LogCaptureFixture) -> None:
    def body(c: Communicator) -> torch.Tensor:
        out = torch.zeros(2048)
        c.reduce_scatter(out, data(c.rank, 2 * 2048), "w", factor="avg")
        return out

    with caplog.at_level(logging.WARNING, "commlib"):
        found = on_ranks(2, EF, body)
    assert "reduce_scatter knows no sums of codes" in caplog.text
    exact = (data(0, 4096) + data(1, 4096)) / 2
    assert torch.allclose(torch.cat(found), exact)


def test_its_error_is_told() -> None:
    assert 0.9 * 0.0199 < typical_error("fp32@thc") ** 2 < 1.1 * 0.0199

    def body(c: Communicator) -> Any:
        c.all_reduce(data(c.rank, 4096).view(64, 64), "w")
        return [row for row in c.meter.rows() if row["key"] == "w"]

    for rows in on_ranks(2, EF, body):
        assert [row["scheme"] for row in rows] == [EF]
        assert 0.1 < rows[0]["rel_err"] < 0.2


def test_residuals_do_not_go_to_codecs_and_are_shared_out_among_other_ranks() -> None:
    def body(c: Communicator) -> Any:
        infos = {"w": TensorInfo("w", 4096, torch.float32, ndim=2)}
        for step in range(3):
            c.all_reduce(data(c.rank, 4096, step).view(64, 64), "w", factor="avg")
        with pytest.raises(ValueError, match="thc"):
            c.set_policy("int4+ef", infos)
        return c.state_dict()

    states = on_ranks(3, EF, body)
    made = redistribute(states, 2)

    def owed(all_states: list[Any]) -> torch.Tensor:
        rows = [s["compressors"][EF]["residuals"]["w"].double() for s in all_states]
        return torch.stack(rows).mean(0)

    assert torch.allclose(owed(made), owed(states), atol=1e-6)

    def resumed(c: Communicator) -> torch.Tensor:
        c.load_state_dict(made[c.rank])
        x = data(c.rank, 4096).view(64, 64)
        c.all_reduce(x, "w", factor="avg")
        return x

    first, second = on_ranks(2, EF, resumed)
    assert torch.equal(first, second)


def test_one_rank_sends_nothing() -> None:
    def body(t: Transport) -> None:
        c = Communicator(t, EF)
        x = data(0, 4096).view(64, 64)
        c.all_reduce(x, "w", factor=0.5)
        assert torch.equal(x, 0.5 * data(0, 4096).view(64, 64))
        assert t.bytes_sent == 0

    on_ranks(1, EF, lambda c: body(c.transport))
