"""Policies and memories of pipelines: rules per direction, +delta, +reuse, +lep, and restarts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.pipelining.schedules import get_schedule_class

import commlib
from commlib import Policy
from commlib.integrations.pipeline_policy import parse
from commlib.policy import Role
from commlib_kernels.layout import aligned
from tests.integrations.pipeline_cases import (
    BATCH,
    LENGTH,
    MICRO,
    SAMPLES,
    WIDTH,
    Result,
    batch,
    build,
    call,
    counting,
    error_of,
    everywhere,
    has,
    ids,
    loss,
    parameters,
    rows,
    same,
    small_step,
    train,
)
from tests.processes import Pool

ROW = LENGTH * WIDTH  # values of a sample
STAMP = 16


@pytest.mark.parametrize(
    ("policy", "backward", "words"),
    [
        ("int8+ef", None, ("'activation'", "error feedback", "harms the next", "+delta")),
        ({"rules": [{"scheme": "int8+ef"}]}, None, ("'activation'", "error feedback")),
        ({"rules": [{"scheme": "int8+ef", "role": "activation"}]}, None, ("error feedback",)),
        ("int8", "int4+ef", ("'activation_gradient'", "error feedback", "+lep")),
        ("int8", {"rules": [{"scheme": "int4+ef"}]}, ("'activation_gradient'",)),
        ("int8", "int4+delta", ("'activation_gradient'", "+delta")),
        ("int4+lep", None, ("'activation'", "+lep", "activation_gradient")),
        # a table counts for both directions
        ({"rules": [{"scheme": "int4+delta", "key": "*to1"}]}, None, ("'activation_gradient'",)),
        ({"rules": [{"scheme": "int4+lep", "key": "*to1"}]}, None, ("'activation'", "+lep")),
        ("auto", None, ("'auto'", "int8", "backward=")),
        ("int8", "auto", ("'auto'", "int8")),
        ({"rules": [{"scheme": "int8", "from_step": 5}]}, None, ("from_step",)),
    ],
)
def test_refused(policy: Any, backward: Any, words: tuple[str, ...]) -> None:
    has(error_of(lambda: parse(policy, backward), ValueError), words)


@pytest.mark.parametrize("text", ["int8+ef", "auto"])
def test_refused_from_the_environment(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("COMMLIB_POLICY", text)
    has(error_of(lambda: parse(None, None), ValueError), [text.partition("+")[0]])


def test_environment_and_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COMMLIB_POLICY", raising=False)
    assert parse(None, None) == Policy.parse("int8")
    monkeypatch.setenv("COMMLIB_POLICY", "int4")
    assert parse(None, None) == Policy.parse("int4")
    assert parse("int8", None) == Policy.parse("int8")


@pytest.mark.parametrize(
    ("forward", "backward", "expected"),
    [
        ("int8", None, ("int8", "int8")),
        ("int4", "int8", ("int4", "int8")),
        ("int4+delta", None, ("int4+delta", "int4")),
        ("int4+reuse", None, ("int4+reuse", "int4+reuse")),
        ("int4", "int4+lep", ("int4", "int4+lep")),
        (Policy.parse("int4+delta"), None, ("int4+delta", "int4")),
        ("fp32", "int4", ("fp32", "int4")),
        ("int4", "fp32", ("int4", "fp32")),
    ],
)
def test_each_direction_has_its_scheme(forward: Any, backward: Any, expected: Any) -> None:
    policy = parse(forward, backward)
    for role, text in zip((Role.ACTIVATION, Role.ACTIVATION_GRADIENT), expected, strict=True):
        rule = next(rule for rule in policy.rules if rule.role in (None, role))
        assert str(rule.scheme) == text


def policies() -> None:
    """A table with rules per direction and key, and schemes per direction."""
    table = {
        "rules": [
            {"scheme": "fp32", "key": "stage1.forward.to2"},
            {"scheme": "int4", "key": "*.forward.*"},
            {"scheme": "int8", "role": "activation_gradient"},
        ]
    }
    schedule = commlib.wrap(build("1F1B"), table)
    train(schedule, 1)
    found: dict[str, str] = {}
    for part in everywhere(
        {key: row["scheme"].split(":")[0] for key, row in rows(schedule).items()}
    ):
        found |= part
    assert found == {
        "stage0.forward.to1": "int4",
        "stage1.forward.to2": "fp32",
        "stage1.backward.to0": "int8",
        "stage2.backward.to1": "int8",
    }
    reference = train(commlib.wrap(build("1F1B"), "int4", backward="int8"), 1)
    swapped = train(commlib.wrap(build("1F1B"), "int8", backward="int4"), 1)
    assert not reference.equals(swapped)


def wrapping_again() -> None:
    told = {"sample_ids": lambda step: list(range(BATCH))}
    reference = train(commlib.wrap(build(), "int4+delta"), 3, **told)
    schedule = build()
    for step in range(3):
        before = None if step == 0 else commlib.of(schedule)
        commlib.wrap(schedule, "int4+delta", timeout=20.0 + step)
        assert before in (None, commlib.of(schedule))  # and so is its memory
        assert commlib.of(schedule).transport.timeout == 20.0 + step
        last = train(schedule, 1, start=step, **told)
    assert last.equals(Result(reference.outputs[-1:], reference.gradients, reference.weights))
    assert commlib.of(commlib.wrap(schedule)) is before
    kind = type(schedule)
    commlib.wrap(schedule, "int8+delta")
    assert type(schedule) is kind
    assert commlib.of(schedule) is not before
    assert commlib.of(schedule).memory_bytes() == 0
    with counting() as count:
        train(schedule, 1, **told)
    if dist.get_rank() == 0:
        assert count.bytes > BATCH * ROW * 4  # raw again, and metadata
    text = error_of(lambda: commlib.wrap(schedule._stage, "int4+delta"), ValueError)
    has(text, ["wrap the schedule", "sample_ids"])
    has(error_of(lambda: commlib.of(build()), ValueError), ["not wrapped"])
    has(error_of(lambda: commlib.wrap(3, "int8"), ValueError), ["schedule", "int"])  # type: ignore[type-var]


def exact_stretches() -> None:
    """Steps inside exact() are the unwrapped pipeline's, and no memory hears of them."""
    plain = train(build(), 2)
    schedule = commlib.wrap(build(), "int4+delta", backward="int4+lep")
    with commlib.exact():
        assert train(schedule, 2).equals(plain)
    assert commlib.of(schedule).memory_bytes() == 0
    schedule = commlib.wrap(build(), "int4+delta", backward="int4+lep")
    for step in range(4):
        call(schedule, step, sample_ids=ids(step))
        memory = commlib.of(schedule).memory_bytes()
        with commlib.exact(), counting() as count:
            call(schedule, step)
        assert {dtype for dtype, _ in count.messages} == {torch.float32}
        assert commlib.of(schedule).memory_bytes() == memory
        commlib.of(schedule).verify()
    reference = commlib.wrap(build(), "int4+delta", backward="int4+lep")
    outputs = [call(reference, step, sample_ids=ids(step)) for step in range(5)]
    last = call(schedule, 4, sample_ids=ids(4))
    assert last is None or same(last, outputs[-1])


def wire_bytes(fresh: list[bool], bits: int = 4) -> int:
    """One message of +delta: differences with a bf16 scale per 128, first visits raw, the stamp."""
    coded, raw = fresh.count(False) * ROW, fresh.count(True) * ROW
    sections = (coded * bits // 8, coded // 128 * 2, raw * 4)
    return sum(map(aligned, sections)) + STAMP


class Visits:
    """Which samples a bounded store holds, written down once more: least recently visited goes."""

    def __init__(self, room: int) -> None:
        self.room, self.order = room, list[int]()

    def step(self, samples: list[int]) -> list[bool]:
        fresh = [sample not in self.order for sample in samples]
        self.order = [s for s in self.order if s not in samples] + samples
        self.order = self.order[-self.room :]
        return fresh


def delta(store: str) -> Result:
    """Epochs of shuffled samples, with room for three quarters of them."""
    room = 48
    scheme = f"int4+delta:store={store}:cap={room * ROW * 4}"
    schedule = commlib.wrap(build("1F1B"), scheme, backward="int8")
    visits, total = Visits(room), Result()
    wires, first_visits = [], 0
    for epoch in range(4):
        for step in (2 * epoch, 2 * epoch + 1):
            samples = ids(step)
            fresh = visits.step(samples)
            first_visits += sum(fresh)
            with counting() as count:
                result = train(schedule, 1, start=step, sample_ids=samples)
            total.outputs += result.outputs
            if dist.get_rank() == 0:
                sent = [size for dtype, size in count.messages if dtype is torch.uint8]
                parts = [fresh[i : i + SAMPLES] for i in range(0, BATCH, SAMPLES)]
                expected = [wire_bytes(part) for part in parts]
                assert sent[-MICRO:] == expected
                wires.append(sum(expected))
        commlib.of(schedule).verify()
    assert 64 < first_visits < 8 * BATCH  # some were dropped and came again
    if dist.get_rank() == 0:
        assert min(wires) < max(wires)
    total.gradients, total.weights = result.gradients, result.weights
    return total


def delta_in_any_store() -> None:
    memory = delta("host")
    assert delta("device").equals(memory)
    assert delta("disk").equals(memory)


def delta_follows_the_plain_run() -> None:
    """Under weights that change slowly, int4+delta is far nearer to the plain run than int4."""
    errors = {}
    for policy in ("int4", "int4+delta"):
        plain, coded = build(), commlib.wrap(build(), policy, backward="fp32")
        told = {"sample_ids": list(range(BATCH))} if "delta" in policy else {}
        generator = torch.Generator().manual_seed(7)
        for _ in range(4):
            a, b = call(plain, 0), call(coded, 0, **told)
            errors[policy] = 0.0 if a is None else float((a - b).norm() / a.norm())
            for p, q in zip(parameters(plain), parameters(coded), strict=True):
                with torch.no_grad():
                    p += 1e-3 * torch.randn(p.shape, generator=generator)
                    q.copy_(p)
    if dist.get_rank() == 1:
        assert 0 < errors["int4+delta"] < errors["int4"] / 10, errors


def reuse() -> None:
    """A batch that stays costs differences only, and comes nearer each time."""
    for name in ("1F1B", "ZBVZeroBubble"):
        schedule = commlib.wrap(build(name), "int4+reuse", backward="int4+reuse")
        plain, errors, sent = build(name), [], []
        for step in range(8):
            a = call(plain, step // 4)
            with counting() as count:
                b = call(schedule, step // 4, is_fresh=step % 4 == 0)
            errors.append(0.0 if a is None else float((a - b).norm() / a.norm()))
            sent.append(count.bytes)
        commlib.of(schedule).verify()
        if errors[1]:
            assert errors[0] < 1e-6
            assert errors[4] < 1e-6  # a fresh batch travels raw
        assert sent[4] > 7.5 * sent[5]
        assert sent[5] == sent[6] == sent[7]
        assert sent[1] == sent[5]


def lep() -> None:
    """The residual of a gradient joins the next micro-batch's: of equal ones the sum is right."""
    grads: dict[str, list[torch.Tensor]] = {}
    for backward in ("fp32", "int2", "int2+lep"):
        schedule = commlib.wrap(build(), "fp32", backward=backward)
        x, target = (batch(seed)[:SAMPLES].repeat(MICRO, 1, 1) for seed in (0, 50))
        if dist.get_rank() == 0:
            schedule.step(x)
        else:
            schedule.step(target=target)
        grads[backward] = [p.grad for p in parameters(schedule)]  # type: ignore[misc]
        remembers = "lep" in backward and dist.get_rank() == 1
        assert (commlib.of(schedule).memory_bytes() > 0) == remembers
    if dist.get_rank() == 0:
        plain, without, with_lep = (Result(gradients=g) for g in grads.values())
        assert 0 < with_lep.error(plain) < without.error(plain) / 3


def fresh_differs() -> None:
    schedule = commlib.wrap(build("1F1B"), "int4+reuse", timeout=20.0)
    small_step(schedule, 0, is_fresh=True)
    text = error_of(lambda: small_step(schedule, 0, is_fresh=dist.get_rank() == 0), RuntimeError)
    has(text, ["disagree", "is_fresh", "True", "False"])
    small_step(schedule, 0, is_fresh=False)  # nothing was sent: it goes on
    commlib.of(schedule).verify()
    has(error_of(lambda: small_step(schedule, 0), ValueError), ["is_fresh=True or False"])
    commlib.of(schedule).reset()
    text = error_of(lambda: small_step(schedule, 0, is_fresh=False), ValueError)
    has(text, ["first step's batch is fresh"])
    small_step(schedule, 0, is_fresh=True)


def outside_of_a_step(policy: str) -> None:
    """Another schedule of the same stages, not wrapped: its samples are not those of the last."""
    micro = MICRO if policy == "int4+delta" else 1
    schedule = commlib.wrap(build(micro=micro), policy)
    told = {"sample_ids": ids(0)} if policy == "int4+delta" else {"is_fresh": True}
    train(schedule, 1, **told)
    before = commlib.of(schedule).state_dict()
    other = get_schedule_class("GPipe")(schedule._stage, micro, loss_fn=loss)
    has(error_of(lambda: call(other, 1), ValueError), ["begin("])
    after = commlib.of(schedule).state_dict()
    assert str(before) == str(after)
    commlib.of(schedule).verify()


def two_schedules_of_a_stage() -> None:
    """Whichever was wrapped last: what the stages carry is what both hear of, and count."""
    first = commlib.wrap(build(), "int8")
    second = get_schedule_class("1F1B")(first._stage, MICRO, loss_fn=loss)
    call(first)
    commlib.wrap(second, "int4+delta", backward="int4")
    for step, schedule in enumerate((first, second, first)):
        call(schedule, sample_ids=ids(step))
    has(error_of(lambda: call(first), ValueError), ["sample_ids"])
    commlib.wrap(first, "int8")
    for schedule in (first, second):  # and neither asks for samples any more
        call(schedule)
    commlib.of(second).verify()


def the_store_does_not_fill() -> None:
    """Steps that agree leave a number of keys that does not grow."""
    schedule = commlib.wrap(build("1F1B"), "int4+reuse")
    store = commlib.of(schedule).transport._store
    counts = []
    for step in range(12):
        small_step(schedule, 0, is_fresh=step == 0)
        dist.barrier()
        counts.append(store.num_keys())
        dist.barrier()
    assert counts[-1] <= counts[3], counts


@pytest.mark.processes
@pytest.mark.parametrize(
    ("case", "ranks"),
    [
        (policies, 3),
        (wrapping_again, 2),
        (exact_stretches, 2),
        (delta_in_any_store, 2),
        (delta_follows_the_plain_run, 2),
        (reuse, 2),
        (lep, 2),
        (fresh_differs, 2),
        (two_schedules_of_a_stage, 2),
        (the_store_does_not_fill, 2),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_modes(pool: Pool, case: Any, ranks: int) -> None:
    pool.run(case, ranks=ranks)


@pytest.mark.processes
@pytest.mark.parametrize("policy", ["int4+delta", "int4+reuse"])
def test_messages_outside_of_a_step_are_refused(pool: Pool, policy: str) -> None:
    pool.run(outside_of_a_step, policy, ranks=2)
