"""A broken peer or bad input ends in an error on every living rank.

The trials kill and stop processes, so they start ranks of their own.
"""

from __future__ import annotations

import pytest

from bench.fault_ranks import Trial
from bench.faults import run

pytestmark = pytest.mark.processes

SOON = 1.0  # seconds: the timeout of trials that wait for it


@pytest.mark.parametrize(
    "trial",
    [
        Trial(0, "kill", 3, "int4+ef", victim=1, step=5, delay=0.004),
        Trial(1, "kill", 3, "int4+ef", victim=0, step=3, delay=0.01),
        Trial(2, "kill", 3, "int4+ef", victim=2, step=1),
        Trial(3, "stop", 3, "int4+ef", victim=1, step=4, timeout=SOON),
        Trial(4, "stop", 3, "int4+ef", victim=0, step=6, timeout=SOON),
        Trial(5, "absent", 3, "int4+ef", victim=0, step=4, timeout=SOON),
        Trial(6, "pause", 3, "int4+ef", victim=2, step=4, pause=0.5),
        Trial(7, "bad input", 3, "int4+ef", victim=2),
    ],
    ids=lambda trial: f"{trial.fault}-{trial.victim}-in-step-{trial.step}",
)
def test_every_living_rank_says_what_happened(trial: Trial) -> None:
    outcome = run(trial)
    assert not outcome.problems, "\n".join(outcome.problems)
    if trial.fault != "pause":
        assert outcome.errors
