"""Lazy sampling: the same on every stage, batches that stay, and a restart in the middle."""

from __future__ import annotations

import io
from itertools import islice
from typing import Any

import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    Dataset,
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

import commlib
from commlib.lazy import LazyLoader, LazySampler

Step = tuple[list[int], bool]


def epoch(sampler: LazySampler) -> list[Step]:
    return list(sampler)


def drawn(steps: list[Step]) -> list[int]:
    """Indices of the fresh batches, in order."""
    return [index for indices, fresh in steps if fresh for index in indices]


def test_every_stage_has_the_same_steps() -> None:
    assert commlib.LazySampler is LazySampler
    assert commlib.LazyLoader is LazyLoader
    one, other = LazySampler(100, 8, seed=3), LazySampler(100, 8, seed=3)
    torch.manual_seed(1)
    first = [epoch(one) for _ in range(3)]
    torch.manual_seed(2)
    torch.rand(7)
    assert [epoch(other) for _ in range(3)] == first
    assert first[0] != first[1]
    assert epoch(LazySampler(100, 8, seed=4)) != first[0]
    other.set_epoch(1)
    assert epoch(other) == first[1]


def test_a_batch_stays_until_a_fresh_one_comes() -> None:
    sampler = LazySampler(1000, 10, fresh_prob=0.3)
    before = None
    for _ in range(5):
        steps = epoch(sampler)
        assert len(steps) == len(sampler) == 100
        assert steps[0][1] is True
        for indices, fresh in steps:
            assert len(indices) == 10
            assert type(fresh) is bool
            assert (indices != before) == fresh
            before = indices
        assert len(set(drawn(steps))) == len(drawn(steps))  # no sample twice in an epoch
        assert set(drawn(steps)) <= set(range(1000))


@pytest.mark.parametrize("probability", [0.1, 0.5, 0.9])
def test_fresh_prob_is_the_probability_of_a_new_batch(probability: float) -> None:
    sampler = LazySampler(4000, 2, fresh_prob=probability)
    share = sum(fresh for _, fresh in sampler) / 2000
    assert abs(share - probability) < 0.04


def test_without_reuse_it_is_ordinary_sampling() -> None:
    steps = epoch(LazySampler(103, 10, fresh_prob=1))
    assert all(fresh for _, fresh in steps)
    assert len(steps) == 10
    assert len(set(drawn(steps))) == 100  # the last three make no full batch
    assert drawn(steps) != sorted(drawn(steps))


@pytest.mark.parametrize("used", [0, 1, 7, 11, 12, 13, 30])
def test_a_resumed_run_goes_on_exactly(used: int) -> None:
    def run(sampler: LazySampler) -> Any:
        while True:
            yield from sampler

    whole = list(islice(run(LazySampler(100, 8, seed=1)), 50))
    first = LazySampler(100, 8, seed=1)
    assert list(islice(run(first), used)) == whole[:used]
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = LazySampler(100, 8, seed=1)
    second.load_state_dict(torch.load(file, weights_only=True))
    second.set_epoch(second.epoch)  # as a loop over epochs does: no step is lost
    assert list(islice(run(second), 50 - used)) == whole[used:]


def test_set_epoch_leaves_a_broken_off_epoch() -> None:
    sampler = LazySampler(100, 8)
    whole = [epoch(sampler), epoch(sampler)]
    sampler.set_epoch(0)
    assert list(islice(sampler, 3)) == whole[0][:3]
    assert epoch(sampler) == whole[0][3:]
    sampler.set_epoch(0)
    list(islice(sampler, 3))
    sampler.set_epoch(1)
    assert epoch(sampler) == whole[1]


def test_a_sampler_gives_the_order() -> None:
    steps = epoch(LazySampler(SequentialSampler(range(40)), 4))
    assert drawn(steps) == list(range(len(drawn(steps))))
    data = range(64)

    def shard(rank: int) -> LazySampler:
        return LazySampler(DistributedSampler(data, 2, rank, seed=5), 4, fresh_prob=1)

    left, right = shard(0), shard(1)
    assert len(left) == 8
    first = drawn(epoch(left)), drawn(epoch(right))
    assert set(first[0]).isdisjoint(first[1])
    assert drawn(epoch(left)) != first[0]  # its set_epoch was called
    assert drawn(epoch(shard(0))) == first[0]


def test_what_is_refused() -> None:
    for bad in (0, -0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=r"fresh_prob=.*; allowed: above 0, up to 1"):
            LazySampler(10, 2, fresh_prob=bad)
    for size in (0, 11):
        with pytest.raises(ValueError, match=f"batch_size={size}; allowed: 1 to 10, the samples"):
            LazySampler(10, size)
    for source in (
        RandomSampler(range(10)),
        SubsetRandomSampler(range(10)),
        WeightedRandomSampler([1.0] * 10, 10),
    ):
        name = type(source).__name__
        with pytest.raises(ValueError, match=f"every stage's {name} has another order; give"):
            LazySampler(source, 2)
    with pytest.raises(ValueError, match="source is a BatchSampler; batches are made here"):
        LazySampler(BatchSampler(range(10), 2, False), 2)  # type: ignore[arg-type]
    for how in ({"batch_size": 2.5}, {"batch_size": True}, {"batch_size": 2, "seed": -1}):
        with pytest.raises(ValueError, match=r"(batch_size|seed)=.*; allowed: whole numbers"):
            LazySampler(10, **how)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no state of one, it lacks batch_size, epoch, "):
        LazySampler(10, 2).load_state_dict({})
    state = LazySampler(10, 2, seed=1).state_dict()
    for other in (LazySampler(10, 2), LazySampler(12, 2, seed=1), LazySampler(10, 5, seed=1)):
        with pytest.raises(ValueError, match=r"the state is of .*'seed': 1}, this one is"):
            other.load_state_dict(state)


class Squares(Dataset[torch.Tensor]):
    """Counts what is loaded from it."""

    def __init__(self) -> None:
        self.loaded: list[int] = []

    def __getitem__(self, index: int) -> torch.Tensor:
        self.loaded.append(index)
        return torch.tensor(float(index * index))

    def __len__(self) -> int:
        return 100


def test_the_loader_loads_a_batch_once_while_it_stays() -> None:
    data = Squares()
    steps = epoch(LazySampler(100, 8))
    loader = LazyLoader(data, LazySampler(100, 8), collate_fn=torch.stack)
    assert len(loader) == len(steps) == 12
    got = list(loader)
    assert [fresh for _, fresh in got] == [fresh for _, fresh in steps]
    for (batch, _), (indices, _) in zip(got, steps, strict=True):
        assert batch.equal(torch.tensor(indices).float().square())
    assert data.loaded == drawn(steps)
    assert next(iter(LazyLoader(data, LazySampler(100, 8))))[0].shape == (8,)  # default collate


@pytest.mark.parametrize("used", range(1, 12))
def test_the_loader_resumes_exactly(used: int) -> None:
    """Also in the middle of a batch's stay: it is loaded again and not called fresh."""
    whole = list(LazyLoader(Squares(), LazySampler(100, 8)))
    first = LazySampler(100, 8)
    list(islice(LazyLoader(Squares(), first), used))
    second = LazySampler(100, 8)
    second.load_state_dict(first.state_dict())
    rest = list(LazyLoader(Squares(), second))
    assert len(rest) == 12 - used
    for (batch, fresh), (wanted, was_fresh) in zip(rest, whole[used:], strict=True):
        assert batch.equal(wanted)
        assert fresh == was_fresh
