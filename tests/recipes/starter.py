"""Runs a recipe with several ranks under one policy after the other, and reports as JSON.

    python -m tests.recipes.starter SCRIPT RANKS POLICY ...

What a recipe imports takes longer than what it trains: this process imports it once and forks the
ranks, each with the environment that torchrun gives. To be alone on its loopback, whose counter
tells what the ranks sent, it is started in a network namespace of its own.
"""

from __future__ import annotations

import ast
import faulthandler
import importlib
import json
import os
import resource
import runpy
import socket
import sys
import traceback
from pathlib import Path

from commlib.emulation import sent_bytes

# What DDP, optimizers and commlib import when they are first used.
LATE = ("torch._dynamo", "commlib.integrations.process_group", "commlib.integrations.wrapping")


def imports(script: str) -> list[str]:
    """The modules that a script imports at its top."""
    found: list[str] = []
    for node in ast.parse(Path(script).read_text()).body:
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.append(node.module)
    return found


def fork(script: str, rank: int, ranks: int, port: int, policy: str) -> int:
    """Start one rank; its output goes to the file `POLICY-RANK`."""
    pid = os.fork()
    if pid:
        return pid
    try:
        for stream in (1, 2):
            os.dup2(os.open(f"{policy}-{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "GROUP_RANK": "0",
            "WORLD_SIZE": str(ranks),
            "LOCAL_WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "TORCHELASTIC_RUN_ID": "recipes",
            "GLOO_SOCKET_IFNAME": "lo",
            "COMMLIB_POLICY": policy,
        }
        faulthandler.dump_traceback_later(float(os.environ.get("HANGS_AFTER", "280")), exit=True)
        # Kept: as in a script of its own, the model is not freed before the process ends. torch
        # frees a DDP model's gloo with the GIL held, and its threads may wait for that.
        _left = runpy.run_path(script, run_name="__main__")
        sys.stdout.flush()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def main(script: str, ranks: int, policies: list[str]) -> None:
    for name in (*LATE, *imports(script)):
        importlib.import_module(name)
    for policy in policies:
        before, port = sent_bytes("lo"), free_port()
        pids = [fork(script, rank, ranks, port, policy) for rank in range(ranks)]
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        row = {
            "policy": policy,
            "codes": codes,
            "sent": sent_bytes("lo") - before,
            "outputs": [Path(f"{policy}-{rank}").read_text() for rank in range(ranks)],
            "cpu": used.ru_utime + used.ru_stime,
        }
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3:])
