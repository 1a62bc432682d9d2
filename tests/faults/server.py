"""Starts ranks in hundredths of a second instead of ten: has everything loaded already, and forks.

Runs beside emulated hosts, where their process numbers mean something. Requests and answers are
lines of JSON on stdin and stdout:

    ["start", host, argv, environment, file]   a rank of train.py, its output in `file`; its pid
    ["signal", pid, number]                    null
    ["poll", pid]                              its exit code once it has ended (-9: by SIGKILL)
"""

from __future__ import annotations

import ctypes
import json
import os
import socket
import sys
import traceback
from typing import Any

import torch
import torch._dynamo  # which DDP and optimizers import on first use

from commlib import Communicator
from commlib.transport import Transport, run_ranks
from tests.faults import train

CLONE_NEWUTS, CLONE_NEWNET = 0x04000000, 0x40000000


def start(host: int, argv: list[str], environment: dict[str, str], file: str) -> int:
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            become(host, environment, file)
            sys.argv = ["train.py", *argv]
            train.main()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            # Not sys.exit: what this process would do at its end is the server's.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return pid


def become(host: int, environment: dict[str, str], file: str) -> None:
    """Move this process to `host`, and away from the server's pipes."""
    os.setsid()
    out = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    null = os.open(os.devnull, os.O_RDONLY)
    for ours, theirs in ((null, 0), (out, 1), (out, 2)):
        os.dup2(ours, theirs)
    space = os.open(f"/run/netns/host{host}", os.O_RDONLY)
    libc = ctypes.CDLL(None, use_errno=True)  # Python 3.12 has os.setns and os.unshare
    if libc.setns(space, CLONE_NEWNET) or libc.unshare(CLONE_NEWUTS):
        raise OSError(ctypes.get_errno(), f"host {host} cannot be entered")
    socket.sethostname(f"host{host}")  # ranks tell by it who shares a host with them
    os.environ.update(environment)


def poll(pid: int) -> int | None:
    ended, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if ended else None


def warm(transport: Transport) -> None:
    """Load the kernels, and compile them if need be: a rank that did would keep others waiting."""
    communicator = Communicator(transport, train.POLICY)
    communicator.all_reduce(torch.ones(256, 256), "weight")
    communicator.close()


def main() -> None:
    torch.set_num_threads(1)
    run_ranks(2, warm, timeout=300)
    calls: dict[str, Any] = {"start": start, "signal": os.kill, "poll": poll}
    print('"ready"', flush=True)
    for line in sys.stdin:
        verb, *args = json.loads(line)
        print(json.dumps(calls[verb](*args)), flush=True)


if __name__ == "__main__":
    main()
