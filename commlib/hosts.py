"""Which host a process is on, as a text that its ranks tell one another.

Not LOCAL_RANK, and not the number of devices: those are of a launcher and of a process, and say
nothing of the members of a group.
"""

from __future__ import annotations

import hashlib
import os
import socket
from contextlib import suppress
from pathlib import Path

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
NETWORK = Path("/proc/self/ns/net")
DIGITS = 12


def identity() -> str:
    """Equal in processes of one host, and in those alone: its name, and a digest of what it is.

    Name, boot and network namespace: containers of one machine that have a network each are hosts
    of their own. NCCL_HOSTID says instead what is one host, as it does to NCCL.
    """
    given = os.environ.get("NCCL_HOSTID")
    if given:
        return given
    name = socket.gethostname()
    facts = [name]
    with suppress(OSError):  # a sandbox without /proc: its name has to do
        facts += [BOOT_ID.read_text(), str(NETWORK.stat().st_ino)]
    return f"{name}#{digest(*facts)}"


def digest(*texts: str) -> str:
    """A short text that differs where these do."""
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:DIGITS]
