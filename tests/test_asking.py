"""Questions to a store: whose silence is an error, and whose is not."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from signal import SIGCONT, SIGSTOP

import pytest
import torch
import torch.distributed as dist

from commlib.asking import Asking
from tests.processes import Pool

SECONDS = 1.0


def test_answers_and_errors_are_those_of_the_call() -> None:
    ask = Asking("the store")
    assert ask(lambda: 3, SECONDS) == 3
    with pytest.raises(KeyError, match="gone"):
        ask(lambda: {}["gone"], SECONDS)


def test_a_store_that_is_silent_is_not_waited_for_twice() -> None:
    ask, silent = Asking("the store"), threading.Event()
    with pytest.raises(RuntimeError, match="the store did not answer within 1 s"):
        ask(silent.wait, SECONDS)
    with pytest.raises(RuntimeError, match="the store still does not answer"):
        ask(lambda: 3, SECONDS)
    silent.set()
    while ask._unanswered is not None and ask._unanswered.is_alive():
        time.sleep(0.01)
    assert ask(lambda: 3, SECONDS) == 3


def stopped_while_it_asks() -> int | None:
    """Rank 0's answer; rank 1 lets it go on once it has been stopped for longer than it waits."""
    pid = torch.tensor([os.getpid()])
    dist.broadcast(pid, 0)
    if dist.get_rank() == 1:
        while " (stopped)" not in Path(f"/proc/{pid.item()}/status").read_text():
            time.sleep(0.01)
        time.sleep(2 * SECONDS)
        os.kill(int(pid), SIGCONT)
        return None

    def call() -> int:
        time.sleep(SECONDS / 4)  # this process waits already
        os.kill(os.getpid(), SIGSTOP)
        time.sleep(SECONDS / 4)  # the answer is there a little after this process goes on
        return 3

    return int(Asking("the store")(call, SECONDS))


@pytest.mark.processes
def test_time_in_which_the_asking_process_is_stopped_is_not_counted(pool: Pool) -> None:
    assert pool.run(stopped_while_it_asks, ranks=2) == [3, None]
