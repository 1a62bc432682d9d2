"""A network of emulated hosts: network namespaces on a bridge, each with a limited line.

One `Network` is one private set of namespaces, held open by a shell that waits on a pipe from this
process. When the pipe closes, whatever the reason (`close`, an exception, Ctrl-C, SIGKILL of this
process), the shell ends, and as it is process 1 of its own pid namespace the kernel then kills
every rank and drops every interface. So nothing needs a unique name and nothing is left behind.

    host 0: eth0 ===veth=== port0 \\
    host 1: eth0 ===veth=== port1 -- bridge     htb on eth0 limits what a host sends,
    host 2: eth0 ===veth=== port2 /             htb on its port what it receives: a NIC of that rate

Works as root, and for other users inside a user namespace where the system permits one. No packet
leaves the namespaces.
"""

from __future__ import annotations

import os
import re
import select
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from types import TracebackType

MTU = 1500
BURST_SECONDS = 1e-3
MAX_HOSTS = 64

_UNITS = {"bit": 1, "kbit": 10**3, "mbit": 10**6, "gbit": 10**9}
_HOLD = """\
mount -t tmpfs tmpfs /run || exit 1
read -r pid rest < /proc/self/stat
mount -t proc proc /proc 2>/dev/null
echo "$pid"
read -r end
"""


def parse_rate(text: str) -> int:
    """Bits per second of `"200mbit"`, `"1gbit"` or `"2.5 Gbit/s"` (powers of ten, as in tc)."""
    found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([kmg]?bit)(?:/s)?\s*", text.lower())
    bits = int(float(found[1]) * _UNITS[found[2]]) if found else 0
    if bits < 8000:
        raise ValueError(
            f"rate {text!r} is not a line rate: write a number and bit, kbit, mbit or gbit, "
            "at least 8kbit, such as 200mbit"
        )
    return bits


def burst_bytes(bits_per_second: int) -> int:
    """htb bucket: max(2 MTU, rate x 1 ms). A larger one lets small messages travel free."""
    return max(2 * MTU, int(bits_per_second / 8 * BURST_SECONDS))


def sent_bytes(interface: str | None = None) -> int:
    """Bytes, headers included, sent through `interface` (default: the one gloo was given)."""
    name = interface or os.environ.get("GLOO_SOCKET_IFNAME", "lo").split(",")[0]
    return int(Path(f"/sys/class/net/{name}/statistics/tx_bytes").read_text())


class Network:
    """`hosts` emulated hosts on one bridge, each limited to `rate` in both directions.

    A context manager: the hosts exist between `__enter__` and `close`. `rate` is a text such as
    `"200mbit"`, or None for a link as fast as the machine.

    Raises: ValueError for a bad number of hosts or rate, RuntimeError where the system refuses.
    """

    def __init__(self, hosts: int, rate: str | None = None) -> None:
        if not 1 <= hosts <= MAX_HOSTS:
            raise ValueError(f"hosts={hosts}: a network has 1 to {MAX_HOSTS} hosts")
        if rate is not None:
            parse_rate(rate)
        self.hosts = hosts
        self.rate = rate
        self._holder: subprocess.Popen[str] | None = None
        self._enter: list[str] = []

    def __enter__(self) -> Network:
        if self._holder is not None:
            raise RuntimeError("this network is up already")
        errors = []
        mapped = ["--user", "--map-root-user"]
        for user in ([], mapped) if os.geteuid() == 0 else (mapped,):
            try:
                self._hold(user)
                self._wire()
            except (OSError, RuntimeError, subprocess.SubprocessError) as error:
                self.close()
                errors.append(str(error))
            else:
                return self
        raise RuntimeError("cannot emulate hosts here: " + "; ".join(errors))

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Kill everything that runs on the hosts and remove them. May be called twice."""
        holder, self._holder = self._holder, None
        if holder is None:
            return
        for pipe in (holder.stdin, holder.stdout):
            if pipe is not None:
                pipe.close()
        try:
            holder.wait(timeout=10)
        except subprocess.TimeoutExpired:  # --kill-child takes process 1 along
            holder.kill()
            holder.wait()

    def address(self, host: int) -> str:
        """The IPv4 address of a host."""
        self._check(host)
        return f"10.0.0.{host + 1}"

    def command(self, host: int, argv: Sequence[str]) -> list[str]:
        """The command line that runs `argv` on an emulated host."""
        self._check(host)
        if self._holder is None:
            raise RuntimeError("the network is down: use it inside `with Network(...) as network:`")
        # Entering a mount namespace moves to its root: relative paths are meant from here.
        here = ["env", f"--chdir={os.getcwd()}"]
        return [*self._enter, "ip", "netns", "exec", f"host{host}", *here, *argv]

    def set_rate(self, rate: str | None) -> None:
        """Change the line rate of every host, also while ranks are running."""
        for host in range(self.hosts):
            for name, where, field in (
                ("eth0", ["-n", f"host{host}"], "dst"),
                (f"port{host}", [], "src"),
            ):
                lines = self._shape(name, rate, field)
                self._run(["tc", *where, "-batch", "-"], "\n".join(lines))
        self.rate = rate

    def _shape(self, name: str, rate: str | None, field: str) -> list[str]:
        """tc commands for one interface: the line, and under it a fair share for each other host.

        Packets are told apart by `field`: "dst" on the way out of a host, "src" on the way in. In
        one plain queue a connection starves the others; Linux hosts queue fairly by default.
        """
        if rate is None:
            return [f"qdisc delete dev {name} root"] if self.rate is not None else []
        bits, least = parse_rate(rate), 2 * MTU
        burst = burst_bytes(bits)
        top = f"ceil {bits}bit cburst {burst} quantum {least}"
        part = f"htb rate {bits // self.hosts}bit burst {least} {top}"  # the rest is borrowed
        classes = [f"parent 1: classid 1:1 htb rate {bits}bit burst {burst} {top}"]
        classes += [f"parent 1:1 classid 1:{leaf:x} {part}" for leaf in range(2, self.hosts + 3)]
        lines = [f"class replace dev {name} {text}" for text in classes]
        if self.rate is None:
            lines.insert(0, f"qdisc replace dev {name} root handle 1: htb default 2")  # 2: ARP
            lines += [
                f"filter add dev {name} parent 1: protocol ip "
                f"u32 match ip {field} {self.address(host)} flowid 1:{host + 3:x}"
                for host in range(self.hosts)
            ]
        return lines

    def _check(self, host: int) -> None:
        if not 0 <= host < self.hosts:
            raise ValueError(f"host {host}: this network has hosts 0 to {self.hosts - 1}")

    def _hold(self, user: list[str]) -> None:
        """Open the namespaces; they live as long as the pipe to the shell inside."""
        spaces = ["--net", "--mount", "--pid"]
        self._holder = subprocess.Popen(
            ["unshare", *user, *spaces, "--fork", "--kill-child", "sh", "-c", _HOLD],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,  # Ctrl-C is for this process, which then closes the pipe
        )
        assert self._holder.stdout is not None
        ready, _, _ = select.select([self._holder.stdout], [], [], 10.0)
        answer = self._holder.stdout.readline().strip() if ready else "no answer within 10 s"
        if not answer.isdigit():
            raise RuntimeError(f"`unshare {' '.join([*user, *spaces])}` failed: {answer}")
        # --preserve-credentials: a user namespace refuses nsenter's default setgroups().
        joined = ["--user", "--preserve-credentials", *spaces] if user else spaces
        self._enter = ["nsenter", "--target", answer, *joined, "--"]

    def _wire(self) -> None:
        lines = ["link set lo up", "link add bridge type bridge", "link set bridge up"]
        for host in range(self.hosts):
            name, port = f"host{host}", f"port{host}"
            lines += [
                f"netns add {name}",
                f"link add {port} mtu {MTU} type veth peer name eth0 mtu {MTU} netns {name}",
                f"link set {port} addrgenmode none master bridge up",
            ]
        self._run(["ip", "-batch", "-"], "\n".join(lines))
        for host in range(self.hosts):
            # No IPv6 address: gloo must find the same kind of address on every host.
            inside = (
                f"link set lo up\nlink set eth0 addrgenmode none\n"
                f"addr add {self.address(host)}/24 dev eth0\nlink set eth0 up"
            )
            self._run(["ip", "-n", f"host{host}", "-batch", "-"], inside)
            # The one congestion control that every kernel allows here: results of a machine whose
            # default is another (bbr sent 15% slower through these queues) are comparable.
            control = "echo reno > /proc/sys/net/ipv4/tcp_congestion_control"
            self._run(["ip", "netns", "exec", f"host{host}", "sh", "-c", control], "")
        rate, self.rate = self.rate, None
        self.set_rate(rate)

    def _run(self, argv: list[str], text: str) -> None:
        """Run a command beside the hosts (where the bridge is), with `text` as its input."""
        done = subprocess.run(
            [*self._enter, *argv], input=text + "\n", capture_output=True, text=True, timeout=30
        )
        if done.returncode:
            raise RuntimeError(f"`{' '.join(argv)}` failed: {(done.stderr or done.stdout).strip()}")


@cache
def available() -> str | None:
    """None where hosts can be emulated (tried once, on a network of one host), else the reason."""
    try:
        with Network(1, "100mbit"):
            return None
    except RuntimeError as error:
        return str(error)


def rate_here(rate: str | None) -> str | None:
    """`rate` where hosts can be emulated; else None, loopback, which is said on stderr."""
    if rate is None or (reason := available()) is None:
        return rate
    print(
        f"commlib: no emulated hosts here ({reason}); running on loopback without a rate limit, so "
        "these times say nothing about a slow network",
        file=sys.stderr,
    )
    return None
