"""The centre and its links: both ends hold the same bits, whatever travels, dies or comes again."""

from __future__ import annotations

import io
import json
import math
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from commlib.optim import Add, Averaged, Center, Link, Momentum, local
from commlib.optim.center import HEADER, Kind, Message, packed
from commlib.optim.link import EMPTY
from commlib.optim.rules import Rule

Named = list[tuple[str, torch.Tensor]]

SCHEMES = ("fp32", "bf16", "int8", "int4", "int2", "rotate|eden2", "sign", "int4+ef", "e3m0")
SIZES = (300, 7, 1)


def params(seed: int = 0, dtype: torch.dtype = torch.float32) -> Named:
    generator = torch.Generator().manual_seed(seed)
    return [
        (f"p{place}", torch.randn(n, generator=generator).to(dtype))
        for place, n in enumerate(SIZES)
    ]


def noise(generator: torch.Generator, like: torch.Tensor) -> torch.Tensor:
    return torch.randn(like.shape, generator=generator).to(like.dtype)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def from_file(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def centers_copy(center: Center, worker: str) -> torch.Tensor:
    copy = center.session(worker).copy
    assert copy is not None
    return copy


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("push", SCHEMES)
def test_both_ends_hold_the_same_bits(
    push: str, dtype: torch.dtype, generator: torch.Generator
) -> None:
    center = Center(params(dtype=dtype), push=push)
    links = [local(center, params(dtype=dtype), f"w{i}") for i in range(3)]
    for step in range(60):
        link = links[step % 3]
        update = noise(generator, link.copy)
        if step == 30:
            update[5] = math.nan
        arrives = link.push(update)
        assert arrives.isfinite().all()
        link.pull()
        assert same(link.copy, centers_copy(center, link.worker))
    assert center.version == 60
    assert center.values.isfinite().all()


@pytest.mark.parametrize("push", ["int4", "int2", "rotate|eden2", "sign"])
def test_a_copy_comes_to_what_the_centre_has(push: str, generator: torch.Generator) -> None:
    """What rounding leaves of a difference is in the next one."""
    center = Center(params(), push=push)
    link = local(center, params(), "w")
    other = local(center, params(), "other")
    other.push(noise(generator, other.copy))
    first = float((link.copy - center.values).norm())
    for _ in range(60):
        link.pull()
    assert float((link.copy - center.values).norm()) < 0.02 * first


def test_the_worker_applies_what_arrives(generator: torch.Generator) -> None:
    center = Center(params(), push="int2")
    link = local(center, params(), "w")
    before, update = center.values.clone(), noise(generator, link.copy)
    arrives = link.push(update)
    assert torch.equal(center.values, before + arrives)
    assert not torch.equal(arrives, update)


def test_a_worker_that_begins_alike_gets_no_values() -> None:
    center = Center(params())
    alike, other = local(center, params(), "alike"), local(center, params(1), "other")
    raw = center.values.nbytes
    assert alike.bytes_received < raw + HEADER < other.bytes_received
    assert same(alike.copy, center.values)
    assert same(other.copy, center.values)


def test_bytes_are_those_of_messages(generator: torch.Generator) -> None:
    center = Center(params(), push="int4")
    link = local(center, params(), "w")
    sent, received = link.bytes_sent, link.bytes_received
    link.push(noise(generator, link.copy))
    link.pull()
    wire = center.session("w")._push.nbytes
    assert link.bytes_sent - sent == (HEADER + wire) + HEADER
    assert link.bytes_received - received == HEADER + wire
    assert center.bytes_received == link.bytes_sent
    assert center.bytes_sent == link.bytes_received


def test_delays_are_counted(generator: torch.Generator) -> None:
    center = Center(params())
    a, b = local(center, params(), "a"), local(center, params(), "b")
    a.push(noise(generator, a.copy))
    a.push(noise(generator, a.copy))
    b.push(noise(generator, b.copy))
    b.pull()
    b.push(noise(generator, b.copy))
    assert center.delays == {0: 2, 1: 1, 2: 1}


def run(center: Center, links: list[Link], steps: range) -> None:
    for step in steps:
        link = links[step % len(links)]
        generator = torch.Generator().manual_seed(step)
        link.push(noise(generator, link.copy) + (link.copy - link.pull()))


@pytest.mark.parametrize("push", ["int4+ef", "int2:round=stochastic", "fp32"])
@pytest.mark.parametrize("rule", [lambda: None, lambda: Averaged(Momentum(0.9), 0.1)])
def test_resume_is_bitwise(push: str, rule: Callable[[], Rule | None]) -> None:
    def fresh() -> Center:
        return Center(params(), push=push, pull="int8", rule=rule(), seed=3)

    def links(center: Center, states: list[Any]) -> list[Link]:
        return [local(center, params(), f"w{i}", states[i]) for i in range(2)]

    whole = fresh()
    run(whole, links(whole, [None] * 2), range(12))
    first = fresh()
    before = links(first, [None] * 2)
    run(first, before, range(7))
    states = [from_file(link.state_dict()) for link in before]
    second = fresh()
    second.load_state_dict(from_file(first.state_dict()))
    after = links(second, states)
    assert all(link.bytes_received < whole.values.nbytes for link in after)
    run(second, after, range(7, 12))
    assert same(second.values, whole.values)
    assert second.delays == whole.delays


def test_a_worker_out_of_step_begins_with_the_values(generator: torch.Generator) -> None:
    center = Center(params(), push="int4")
    link = local(center, params(), "w")
    old = link.state_dict()
    link.push(noise(generator, link.copy))
    again = local(center, params(), "w", old)
    assert same(again.copy, center.values)
    again.pull()
    assert same(again.copy, centers_copy(center, "w"))


@pytest.mark.parametrize(
    ("mine", "told"),
    [
        ([("p0", torch.zeros(300)), ("p1", torch.zeros(7))], "names"),
        ([("p0", torch.zeros(301)), ("p1", torch.zeros(7)), ("p2", torch.zeros(1))], "sizes"),
        (params(dtype=torch.bfloat16), "torch.bfloat16"),
    ],
)
def test_other_parameters_are_refused(mine: Named, told: str) -> None:
    center = Center(params())
    with pytest.raises(ValueError, match=f"worker 'w' has .*{told}"):
        local(center, mine, "w")
    local(center, params(), "w").pull()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"push": "int2", "pull": "int2:round=stochastic"}, "does not contract"),
        ({"push": "int4", "pull": "int4+ef"}, "without feedback"),
        ({"push": "int4|entropy"}, "size is known"),
        ({"push": "int4+lep"}, "mode of pipeline stages"),
        ({"push": "fp32+ef@power_sgd"}, "no low rank"),
        ({"push": "int5000"}, "does not exist"),
    ],
)
def test_schemes_that_cannot_serve_are_refused(options: dict[str, str], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        Center(params(), **options)  # type: ignore[arg-type]


def test_parameters_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match=r"torch\.float16 and torch\.float32"):
        Center([("a", torch.zeros(1)), ("b", torch.zeros(1, dtype=torch.float16))])
    with pytest.raises(ValueError, match="none"):
        Center([])


def test_a_state_of_another_centre_is_refused() -> None:
    center = Center(params(), push="int4")
    with pytest.raises(ValueError, match="allowed"):
        center.load_state_dict(Center(params(), push="int8").state_dict())
    averaged = Center(params(), push="int4", rule=Averaged(Add()))
    for one, other, rule in ((center, averaged, "Averaged"), (averaged, center, "Add")):
        with pytest.raises(ValueError, match=f"of the rule {rule}, allowed"):
            one.load_state_dict(other.state_dict())


def test_messages_that_make_no_sense_change_nothing(generator: torch.Generator) -> None:
    center = Center(params(), push="int4")
    session = center.session("w")
    with pytest.raises(RuntimeError, match="PULL before JOIN"):
        session.answer(Message(Kind.PULL, 0, EMPTY))
    link = local(center, params(), "w")
    wire, _ = link._push.encode(noise(generator, link.copy))
    values = center.values.clone()
    for body in (wire[:-1], wire.flip(0), torch.zeros_like(wire)):
        with pytest.raises(RuntimeError, match="message 1 of w/push"):
            session.answer(Message(Kind.PUSH, 0, body))
    with pytest.raises(RuntimeError, match="sent COPY, which is the centre's"):
        session.answer(Message(Kind.COPY, 0, wire))
    assert same(center.values, values)
    session.answer(Message(Kind.PUSH, 0, wire))
    assert center.version == 1


def test_a_join_says_who_it_is() -> None:
    center = Center(params())
    reply = center.session("w").answer(Message(Kind.JOIN, 0, packed(json.dumps({}))))
    assert reply is not None
    assert reply.kind is Kind.REFUSED


def test_momentum_at_the_centre() -> None:
    """v <- m v + u, xc <- xc + v; workers see xc + m v."""
    center = Center([("x", torch.zeros(1))], rule=Momentum(0.5))
    link = local(center, [("x", torch.zeros(1))], "w")
    one = torch.ones(1)
    seen = []
    for _ in range(3):
        link.push(one)
        seen.append((float(center.values), float(link.pull())))
    assert seen == [(1.0, 1.5), (2.5, 3.25), (4.25, 5.125)]


@pytest.mark.parametrize(("rate", "average"), [(None, 2.0), (0.5, 2.125)])
def test_the_average_of_iterates(rate: float | None, average: float) -> None:
    rule = Averaged(Center([("x", torch.zeros(1))]).rule, rate)
    center = Center([("x", torch.zeros(1))], rule=rule)
    link = local(center, [("x", torch.zeros(1))], "w")
    for _ in range(3):
        link.push(torch.ones(1))
    assert float(center.values) == 3.0
    assert rule.average is not None
    assert float(rule.average) == pytest.approx(average)


@pytest.mark.parametrize("make", [lambda: Momentum(1.0), lambda: Averaged(Momentum(0.5), 2.0)])
def test_rates_that_cannot_be(make: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match="allowed"):
        make()


@pytest.mark.parametrize("push", ["fp32", "int4+ef"])
@pytest.mark.parametrize(
    "update", [torch.ones(1), torch.ones(307), torch.ones(308, 1), torch.ones(308).double()]
)
def test_an_update_that_is_none_is_refused_before_anything_is_sent(
    push: str, update: torch.Tensor
) -> None:
    center = Center(params(), push=push)
    link = local(center, params(), "w")
    with pytest.raises(ValueError, match=r"allowed: \(308,\), torch\.float32"):
        link.push(update)
    link.push(torch.ones(308))
    assert center.version == 1


def test_a_worker_that_comes_again_cuts_its_old_link() -> None:
    """Two workers by one name are told, instead of taking each other's messages."""
    center = Center(params())
    old = local(center, params(), "w")
    new = local(center, params(), "w")
    with pytest.raises(RuntimeError, match="link of worker 'w' was cut: a newer link"):
        old.push(torch.ones(308))
    with pytest.raises(RuntimeError, match="newer link bears its name"):
        old.pull()
    new.push(torch.ones(308))
    assert center.version == 1


def test_a_link_that_was_closed_says_so() -> None:
    link = local(Center(params()), params(), "w")
    link.close()
    link.close()
    with pytest.raises(RuntimeError, match="link of worker 'w' has ended: it was closed"):
        link.pull()


def test_a_join_that_is_no_object_is_refused() -> None:
    with pytest.raises(RuntimeError, match="joined as"):
        Center(params()).session("w").answer(Message(Kind.JOIN, 0, packed("[1]")))


@pytest.mark.parametrize("inside", [True, False])
def test_a_save_meanwhile_is_of_a_moment_between_messages(inside: bool) -> None:
    """Alone, a worker's copy is the centre's values: so it is in whatever is saved."""
    saved: list[Any] = []

    class Slow(Add):
        def apply(self, values: torch.Tensor, update: torch.Tensor, delay: int) -> None:
            super().apply(values, update, delay)
            if not inside:
                thread = threading.Thread(target=save)
                threads.append(thread)
                thread.start()
                thread.join(0.2)

    def save() -> None:
        saved.append(center.state_dict())

    threads: list[threading.Thread] = []
    center = Center(params(), rule=Slow())
    if inside:
        center.after = lambda version: save()
    link = local(center, params(), "w")
    for _ in range(2):
        link.push(torch.ones(308))
    for thread in threads:
        thread.join(10)
    assert len(saved) == 2
    for state in saved:
        assert same(state["values"], state["sessions"]["w"]["copy"])


def test_a_save_that_fails_ends_the_link() -> None:
    """The centre has the update, the worker's copy has not: all that follows would be off by it."""

    def save(version: int) -> None:
        raise OSError("no space left")

    center = Center(params())
    link = local(center, params(), "w")
    center.after = save
    with pytest.raises(OSError, match="no space left"):
        link.push(torch.ones(308))
    center.after = None
    with pytest.raises(RuntimeError, match="'w' has ended, as a message failed: OSError: no space"):
        link.pull()
    again = local(center, params(), "w", link.state_dict())
    assert same(again.pull(), center.values)


def test_saves_by_several_workers_at_once_end() -> None:
    center = Center(params())
    center.after = lambda version: [center.state_dict(), None][1]

    def work(name: str) -> None:
        link = local(center, params(), name)
        for _ in range(50):
            link.push(torch.ones(308))

    threads = [threading.Thread(target=work, args=(f"w{i}",), daemon=True) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert center.version == 200


def test_values_are_not_written_to_other_parameters() -> None:
    center = Center(params())
    other = torch.ones(300)
    with pytest.raises(ValueError, match="got 1 parameters of 300 values, its centre has 3 of 308"):
        center.copy_to([other])
    assert other.all()
    turned = [torch.ones(tensor.numel()) for _, tensor in reversed(params())]
    with pytest.raises(ValueError, match="in another order"):
        center.copy_to(turned)
    assert all(one.all() for one in turned)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_what_is_not_finite_moves_neither_end(dtype: torch.dtype) -> None:
    """Raw messages: NaN and Inf count as 0, and zeros keep to one sign at both ends."""
    center = Center([("x", torch.tensor([1.0, 2.0, 3.0, -0.0, 0.0], dtype=dtype))])
    start = [("x", torch.zeros(5, dtype=dtype))]
    link = local(center, start, "w")
    update = torch.tensor([math.nan, math.inf, -math.inf, -0.0, -0.0], dtype=dtype)
    for _ in range(2):
        assert not link.push(update).any()
        link.pull()
        assert same(link.copy, centers_copy(center, "w"))
    assert center.values.tolist() == [1.0, 2.0, 3.0, 0.0, 0.0]


@pytest.mark.parametrize("how", ["load", "forget"])
def test_a_link_that_the_centre_no_longer_knows_is_cut(how: str) -> None:
    """Its updates would be of versions to come, and the next save would not know its copy."""
    center = Center(params(), push="int4")
    saved = center.state_dict()
    link = local(center, params(), "w")
    link.push(torch.ones(308))
    if how == "load":
        center.load_state_dict(saved)
    else:
        center.forget("w")
    version = center.version
    with pytest.raises(RuntimeError, match="link of worker 'w' was cut: the centre has"):
        link.push(torch.ones(308))
    assert center.version == version
    again = local(center, params(), "w", link.state_dict())
    again.push(torch.ones(308))
    again.pull()
    assert same(again.copy, centers_copy(center, "w"))
    assert min(center.delays) == 0
