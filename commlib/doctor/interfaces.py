"""Network interfaces of this host, and which of them gloo takes."""

from __future__ import annotations

import fcntl
import os
import socket
import struct
from pathlib import Path

_SIOCGIFADDR = 0x8915  # linux/sockios.h


def addresses() -> dict[str, str]:
    """IPv4 address of every interface that has one."""
    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            try:
                answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)
            except OSError:  # no IPv4 address
                continue
            found[name] = socket.inet_ntoa(answer[20:24])
    return found


def speed(name: str) -> float | None:
    """Bits per second the kernel knows of an interface; None where it does not (virtual, down)."""
    try:
        megabits = int(Path(f"/sys/class/net/{name}/speed").read_text())
    except (OSError, ValueError):
        return None
    return megabits * 1e6 if megabits > 0 else None


def gloo() -> tuple[str | None, str]:
    """The interface gloo takes, and why; None where it would find none.

    gloo takes GLOO_SOCKET_IFNAME, else the interface that holds the address of the host's own
    name, else loopback.
    """
    named = os.environ.get("GLOO_SOCKET_IFNAME")
    if named:
        first = named.split(",")[0]
        known = [name for _, name in socket.if_nameindex()]
        if first not in known:
            return None, f"GLOO_SOCKET_IFNAME={named}, but there is only {', '.join(known)}"
        return first, f"GLOO_SOCKET_IFNAME={named}"
    host = socket.gethostname()
    try:
        own = {str(info[4][0]) for info in socket.getaddrinfo(host, None, socket.AF_INET)}
    except OSError:
        return "lo", f"the host name {host!r} has no address, so gloo falls back to loopback"
    for name, address in addresses().items():
        if address in own:
            return name, f"the host name {host!r} is {address}"
    # 127.0.1.1 and its kin belong to loopback without being its address
    if any(address.startswith("127.") for address in own):
        return "lo", f"the host name {host!r} is {', '.join(sorted(own))}"
    return None, f"the host name {host!r} is {', '.join(sorted(own))}, no interface's address"
