"""DASGD: the rule, the worker, the versions of its residual, and a story with real processes."""

from __future__ import annotations

from collections import deque
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

from commlib.optim import DASGD, Box, Center, Projected, Server, Sharded, connect, local, staleness
from commlib.optim.schedules import (
    Auto,
    Constant,
    DelayAdaptive,
    Inverse,
    InverseLog,
    InverseLogLog,
)
from tests.processes import Pool

WIDTH = 300
BOX = Box(-5.0, 5.0)


def named(start: float = 5.0) -> list[tuple[str, torch.nn.Parameter]]:
    """Two parameters, of more than one block together."""
    shapes = {"a": (20, 10), "b": (100,)}
    return [(name, torch.nn.Parameter(torch.full(s, start))) for name, s in shapes.items()]


def values(params: list[tuple[str, torch.nn.Parameter]]) -> torch.Tensor:
    return torch.cat([p.detach().reshape(-1) for _, p in params])


def curvature() -> torch.Tensor:
    return torch.linspace(0.1, 1, WIDTH)


def backward(
    params: list[tuple[str, torch.nn.Parameter]], noise: torch.Tensor | None = None
) -> None:
    """The gradient of 1/2 x'Ax, with noise."""
    x = torch.cat([p.reshape(-1) for _, p in params])
    for _, p in params:
        p.grad = None
    (0.5 * (curvature() * x * x).sum() + (0 if noise is None else (noise * x).sum())).backward()


def worker(
    center: Center, name: str, **how: Any
) -> tuple[DASGD, list[tuple[str, torch.nn.Parameter]]]:
    params = named()
    return DASGD([p for _, p in params], local(center, params, name), **how), params


def center(rule: Projected | None = None, **how: Any) -> Center:
    return Center(named(), rule=Projected(Inverse(3.0), BOX) if rule is None else rule, **how)


def test_lazy_projection() -> None:
    """Y keeps what X cannot show; projected at once, it is lost."""
    y, up = torch.tensor([4.0, -4.0]), torch.tensor([-4.0, 0.0])
    lazy, eager = (Projected(Constant(0.5), BOX, lazy=lazy) for lazy in (True, False))
    one, other = y.clone(), y.clone()
    for rule, where in ((lazy, one), (eager, other)):
        rule.apply(where, up, 0)
        rule.apply(where, up, 0)
        assert torch.equal(rule.shown(where), torch.tensor([5.0, -4.0]))
        rule.apply(where, -up, 0)
    assert torch.equal(lazy.shown(one), torch.tensor([5.0, -4.0]))
    assert torch.equal(one, torch.tensor([6.0, -4.0]))
    assert torch.equal(eager.shown(other), torch.tensor([3.0, -4.0]))


def test_steps_count_at_the_centre_and_see_the_delay() -> None:
    rule = Projected(DelayAdaptive(Inverse(3.0)))
    c = center(rule)
    c.apply(torch.ones(WIDTH), 0)
    c.apply(torch.ones(WIDTH), 0)
    c.apply(torch.ones(WIDTH), 0)
    expected = torch.full((WIDTH,), 5.0)
    for rate in (3 / 3, 3 / 4 / 2, 3 / 5 / 3):
        expected -= torch.tensor(rate)
    torch.testing.assert_close(c.values, expected, rtol=0, atol=2e-6)  # 3 roundings of 5
    assert rule.updates == c.version == 3
    assert c.delays == {0: 1, 1: 1, 2: 1}
    assert staleness(c.delays) == (3, 1, 2, 2)


def test_auto_learns_at_the_centre() -> None:
    auto = Auto(3.0)
    c = center(Projected(auto))
    for n in range(1, 129):
        c.apply(torch.zeros(WIDTH), n // 2)
    assert isinstance(auto.chosen, InverseLog)


@pytest.mark.parametrize("lazy", [False, True])
def test_what_is_shown_is_in_the_set(lazy: bool) -> None:
    c = center(Projected(Inverse(3.0), Box(-5.0, 3.0), lazy=lazy))
    assert torch.equal(c.shown()[0], torch.full((WIDTH,), 3.0))


def test_errors() -> None:
    c = center()
    with pytest.raises(ValueError, match=r"update n = 1 with delay -2, allowed"):
        c.apply(torch.ones(WIDTH), 2)
    assert c.version == 0
    assert torch.equal(c.values, torch.full((WIDTH,), 5.0))
    for low, high in ((1.0, 0.0), (float("nan"), 0.0), (0.0, float("inf"))):
        with pytest.raises(ValueError, match=r"Box: .*allowed: finite, low <= high"):
            Box(low, high)
    link = local(c, named(), "w")
    with pytest.raises(ValueError, match=r"got 1 parameters of 200 values, its centre has"):
        DASGD([named()[0][1]], link)
    mine = named()
    with pytest.raises(ValueError, match="in another order"):
        DASGD([tensor for _, tensor in reversed(mine)], local(c, mine, "w"))
    with pytest.raises(ValueError, match=r"link is a Sharded, allowed: a Link to one centre"):
        DASGD([tensor for _, tensor in mine], Sharded([link]))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"DASGD: bound is 0, allowed: a whole number"):
        worker(c, "v", bound=0)
    with pytest.raises(ValueError, match=r"pushes gradients, and the rule .* takes updates"):
        worker(Center(named()), "u")
    one, _ = worker(c, "u")
    with pytest.raises(ValueError, match=r"of 7 values, allowed: the link's 300"):
        one.load_state_dict({**one.state_dict(), "numel": 7})


def test_turns_are_sgd_with_delays() -> None:
    """Three workers in turn, exact: the equations by hand, delays 0, 1, 2, 2, ..."""
    c = center()
    workers = [worker(c, f"w{place}") for place in range(3)]
    noises = torch.randn(30, WIDTH, generator=torch.Generator().manual_seed(0))
    iterates = deque([torch.full((WIDTH,), 5.0)] * 3, maxlen=3)
    y = iterates[0]
    for n, noise in enumerate(noises, start=1):
        mine, params = workers[n % 3]
        backward(params, noise)
        mine.step()
        y = y - 3.0 / (n + 2) * (curvature() * iterates[0] + noise)
        iterates.append(BOX(y))
        torch.testing.assert_close(values(params), iterates[-1], rtol=0, atol=1e-5)
    assert c.delays == {0: 1, 1: 1, 2: 28}
    assert workers[0][0].steps == 10
    assert workers[0][0].oldest is None
    assert workers[0][0].residual_age == 0


def test_a_parameter_without_gradient_stays() -> None:
    c = center()
    mine, params = worker(c, "w")
    params[0][1].grad = torch.ones(20, 10)
    assert mine.step(lambda: 1.5) == 1.5
    assert torch.equal(params[1][1].detach(), torch.full((100,), 5.0))
    assert torch.equal(params[0][1].detach(), torch.full((20, 10), 4.0))


def spikes(steps: int) -> torch.Tensor:
    """Gradients of which top-k sends the first element, and leaves the others."""
    made = torch.full((steps, WIDTH), 0.001)
    made[:, 0] = 1.0
    return made


def push(mine: DASGD, params: list[tuple[str, torch.nn.Parameter]], gradient: torch.Tensor) -> None:
    parts = gradient.split([p.numel() for _, p in params])
    for (_, p), part in zip(params, parts, strict=True):
        p.grad = part.view_as(p).clone()
    mine.step()


def test_the_residual_has_versions() -> None:
    """What top-k holds back is as old as its first gradient, until it is sent."""
    c = center(push="topk:density=0.01|fp32+ef")
    mine, params = worker(c, "w")
    other, theirs = worker(c, "v")
    push(other, theirs, spikes(1)[0])  # version 1, of which w has not heard
    for step, gradient in enumerate(spikes(4)):
        push(mine, params, gradient)
        assert mine.oldest == 0
        assert mine.residual_age == c.version == step + 2
    assert other.oldest == 0
    # nobody's gradient is as large as what others left: those go now, until none is of version 0
    ages = []
    for _ in range(WIDTH // 2 - 1):  # three go at once, two of one parameter
        push(mine, params, torch.zeros(WIDTH))
        ages.append(mine.oldest)
    assert ages[0] == 0
    assert ages[-1] is None
    assert mine.residual_age == 0


def test_rounding_sends_the_oldest_first() -> None:
    """Of int4 an element is held only while it rounds to 0: its versions stay young."""
    c = center(push="int4+ef")
    mine, params = worker(c, "w")
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        push(mine, params, torch.randn(WIDTH, generator=generator))
    assert mine.oldest is not None
    assert 1 <= mine.residual_age < 20


def test_what_is_too_old_is_dropped() -> None:
    c = center(push="topk:density=0.01|fp32+ef")
    mine, params = worker(c, "w", bound=3)
    gradients = spikes(12)
    for gradient in gradients[:4]:
        push(mine, params, gradient)
    assert mine.dropped == 0
    assert mine.residual_age == 4
    residual = mine.link.residual()
    assert residual is not None
    first = residual > 0.0035  # never sent: four gradients wait there, the first too
    assert first.sum() > WIDTH - 20
    push(mine, params, gradients[4])
    assert mine.oldest is not None
    assert mine.oldest >= 1
    assert mine.dropped == first.sum()
    residual = mine.link.residual()
    assert residual is not None
    # what is there now is of the last gradient alone, or was sent
    alone = residual[first & (residual != 0)]
    torch.testing.assert_close(alone, torch.full_like(alone, 0.001))
    assert alone.numel() > WIDTH - 20
    for gradient in gradients[5:]:
        push(mine, params, gradient)
        assert mine.residual_age <= 4


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8"])
def test_drop_is_of_these_elements_alone(dtype: str) -> None:
    c = center(push=f"int2+ef:dtype={dtype}")
    mine, params = worker(c, "w")
    push(mine, params, torch.randn(WIDTH, generator=torch.Generator().manual_seed(0)))
    before = mine.link.residual()
    assert before is not None
    assert before.numel() == WIDTH
    old = torch.zeros(WIDTH, dtype=torch.bool)
    old[190:210] = True  # over the border of two parameters
    mine.link.drop(old)
    after = mine.link.residual()
    assert after is not None
    assert not after[old].any()
    assert torch.equal(after[~old], before[~old])
    assert before[old].any()


@pytest.mark.parametrize("stamp_oldest", [False, True])
def test_messages_may_bear_their_oldest_version(stamp_oldest: bool) -> None:
    c = center(push="topk:density=0.01|fp32+ef")
    mine, params = worker(c, "w", stamp_oldest=stamp_oldest)
    for gradient in spikes(5):
        push(mine, params, gradient)
    assert staleness(c.delays).max == (4 if stamp_oldest else 0)


def story(turns: range, c: Center, workers: dict[str, Any]) -> torch.Tensor:
    for n in turns:
        mine, params = workers["w" if n % 3 else "v"]
        noise = torch.randn(WIDTH, generator=torch.Generator().manual_seed(n))
        backward(params, noise)
        mine.step()
    return c.shown()[0]


def test_a_run_goes_on_bit_for_bit() -> None:
    """Saved in the middle and loaded elsewhere: residuals, their versions, what Auto learned."""

    def made() -> Center:
        rule = Projected(DelayAdaptive(Auto(3.0)), BOX)
        return center(rule, push="topk:density=0.1|int8+ef", pull="int8")

    c = made()
    workers = {name: worker(c, name, bound=9) for name in "wv"}
    story(range(25), c, workers)
    saved = c.state_dict()
    links = {name: (w.link.state_dict(), w.state_dict()) for name, (w, _) in workers.items()}
    whole = story(range(25, 60), c, workers)

    again = made()
    again.load_state_dict(saved)
    back = {}
    for name, (link, state) in links.items():
        params = named(0.0)
        one = DASGD([p for _, p in params], local(again, params, name, link), bound=9)
        one.load_state_dict(state)
        back[name] = (one, params)
    assert torch.equal(story(range(25, 60), again, back), whole)
    assert again.delays == c.delays
    for name, (mine, _) in workers.items():
        other = back[name][0]
        assert mine.dropped == other.dropped > 0
        assert mine.oldest == other.oldest
        assert mine.steps == other.steps


def test_a_link_that_begins_anew_has_no_residual() -> None:
    c = center(push="int4+ef")
    mine, params = worker(c, "w")
    push(mine, params, torch.randn(WIDTH, generator=torch.Generator().manual_seed(0)))
    link, state = mine.link.state_dict(), mine.state_dict()
    assert mine.oldest == 0
    push(mine, params, torch.ones(WIDTH))
    params = named(0.0)
    again = DASGD([p for _, p in params], local(c, params, "w", link))
    again.load_state_dict(state)
    assert again.oldest is None
    assert torch.equal(values(params), c.shown()[0])


def drifting(port: int, rank: int, steps: int) -> dict[str, int]:
    """A worker process of the story; every third is one that others overtake."""
    store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=60))
    params = named(0.0)
    link = connect(store, params, f"w{rank}", timeout=60)
    mine = DASGD([p for _, p in params], link)
    generator = torch.Generator().manual_seed(rank)
    for _ in range(steps):
        backward(params, 0.5 * torch.randn(WIDTH, generator=generator))
        mine.step()
    link.close()
    return {"steps": mine.steps, "sent": link.bytes_sent, "oldest": mine.oldest or 0}


def rank_of(port: int, steps: int) -> dict[str, int]:
    return drifting(port, dist.get_rank(), steps)


@pytest.mark.processes
def test_real_processes(pool: Pool) -> None:
    """Three processes, int4 with feedback, delays as they come: it converges, all are counted."""
    store = dist.TCPStore(
        "127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60)
    )
    rule = Projected(InverseLogLog(10.0), BOX)
    c = center(rule, push="int4+ef", pull="int8")
    steps = 100
    with Server(c, store, timeout=60) as server:
        told = pool.run(rank_of, store.port, steps, ranks=3)
        assert server.wait(["w0", "w1", "w2"], 30)
    assert [one["steps"] for one in told] == [steps] * 3
    assert c.version == rule.updates == sum(c.delays.values()) == 3 * steps
    shown = c.shown()[0]
    begun = 0.5 * (curvature() * 25).sum()
    assert 0.5 * (curvature() * shown * shown).sum() < 0.1 * begun
    # 300 values of 4 bits and their scales, twice 48 bytes of headers; raw they are 1200
    assert all(one["sent"] < steps * 500 for one in told)
