"""Emulated hosts: the line rate, what a rank sees, and that nothing is ever left behind."""

from __future__ import annotations

import ast
import os
import signal
import subprocess
import sys
import textwrap
import time
from contextlib import suppress
from pathlib import Path

import pytest

from commlib import emulation
from commlib.emulation import ranks

pytestmark = pytest.mark.processes


@pytest.fixture(scope="module")
def hosts() -> None:
    reason = emulation.available()
    if reason is not None:
        pytest.skip(f"cannot emulate hosts: {reason}")


def python(code: str) -> list[str]:
    return [sys.executable, "-c", textwrap.dedent(code)]


def interfaces() -> set[str]:
    return {entry.name for entry in Path("/sys/class/net").iterdir()}


def alive(marker: str) -> list[int]:
    """Processes whose command line contains `marker` (as one whole argument)."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it may end while we look
            if marker.encode() in (entry / "cmdline").read_bytes().split(b"\0"):
                found.append(int(entry.name))
    return found


def wait_until_gone(marker: str, seconds: float = 5.0) -> list[int]:
    end = time.monotonic() + seconds
    while alive(marker) and time.monotonic() < end:
        time.sleep(0.05)
    return alive(marker)


@pytest.mark.parametrize(
    ("text", "bits"),
    [("200mbit", 200e6), ("1gbit", 1e9), ("2.5 Gbit/s", 2.5e9), ("64kbit", 64e3), ("9000bit", 9e3)],
)
def test_rate_text(text: str, bits: float) -> None:
    assert emulation.parse_rate(text) == bits


@pytest.mark.parametrize("text", ["", "fast", "100", "100mbps", "-1mbit", "0mbit", "1tbit"])
def test_bad_rate_text_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a line rate"):
        emulation.parse_rate(text)


def test_burst_is_a_millisecond_but_two_packets_at_least() -> None:
    assert emulation.burst_bytes(10**9) == 125_000
    assert emulation.burst_bytes(10**7) == 3000


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="hosts=0"):
        emulation.Network(0)
    with pytest.raises(ValueError, match="ranks=0"):
        emulation.spawn(["true"], 0)
    for hosts in (0, 3):
        with pytest.raises(ValueError, match=f"hosts={hosts}: from 1 to ranks=2"):
            emulation.spawn(["true"], 2, hosts=hosts)
    with pytest.raises(ValueError, match="the network has 1"):
        emulation.spawn(["true"], 2, network=emulation.Network(1))
    with pytest.raises(RuntimeError, match="the network is down"):
        emulation.Network(1).command(0, ["true"])


def test_a_command_that_hangs_leaves_no_holder(monkeypatch: pytest.MonkeyPatch) -> None:
    network, closed = emulation.Network(1), []

    def wire() -> None:
        raise subprocess.TimeoutExpired("ip", 30)

    monkeypatch.setattr(network, "_hold", lambda user: None)
    monkeypatch.setattr(network, "_wire", wire)
    monkeypatch.setattr(network, "close", lambda: closed.append(True))
    with pytest.raises(RuntimeError, match=r"cannot emulate hosts here: .*'ip' timed out"):
        network.__enter__()
    assert closed


# Rank 0 counts what arrives; the others send for a while. A sender's socket buffer delays the end
# by its size, so the receiver's clock (first to last byte) is the one to divide by.
TRAFFIC = """
    import os, pathlib, socket, sys, time
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    host, out, seconds = os.environ["MASTER_ADDR"], sys.argv[1], float(sys.argv[2])
    if rank == 0:
        server = socket.create_server((host, 5000))
        links = [server.accept()[0] for _ in range(size - 1)]
        total, start = 0, None
        while links:
            for link in list(links):
                data = link.recv(1 << 16)
                start = start or time.monotonic()
                total += len(data)
                if not data:
                    links.remove(link)
        pathlib.Path(out).write_text(f"{total} {time.monotonic() - start}")
    else:
        for _ in range(250):
            try:
                link = socket.create_connection((host, 5000))
                break
            except OSError:
                time.sleep(0.02)
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            link.sendall(bytes(1 << 14))
        link.close()
"""


def measured_rate(tmp_path: Path, size: int, network: emulation.Network | None = None) -> float:
    """Bits per second that reach rank 0 on 100 Mbit/s hosts (or on `network`)."""
    out = tmp_path / "rate"
    rate = None if network else "100mbit"
    argv = [*python(TRAFFIC), str(out), "1.0"]
    assert emulation.spawn(argv, size, rate=rate, network=network, timeout=30) == 0
    total, seconds = out.read_text().split()
    return 8 * int(total) / float(seconds)


@pytest.mark.usefixtures("hosts")
@pytest.mark.parametrize("size", [2, 3], ids=["one sender", "two senders: the receiver's limit"])
def test_line_rate(tmp_path: Path, size: int) -> None:
    """Ethernet, IP and TCP headers take 66 of 1514 bytes, so at most 0.956 of the line is data."""
    assert 0.85 <= measured_rate(tmp_path, size) / 100e6 <= 1.0


@pytest.mark.usefixtures("hosts")
def test_rate_changes_on_a_running_network(tmp_path: Path) -> None:
    with emulation.Network(2, "1gbit") as network:
        network.set_rate("50mbit")
        assert 0.85 <= measured_rate(tmp_path, 2, network) / 50e6 <= 1.0
        network.set_rate(None)
        assert measured_rate(tmp_path, 2, network) > 100e6


@pytest.mark.usefixtures("hosts")
def test_small_messages_do_not_travel_free(tmp_path: Path) -> None:
    """64 KiB at 10 Mbit/s take 52 ms; a bucket of their size would let them pass in no time."""
    with emulation.Network(2, "10mbit") as network:
        argv = [*python(TRAFFIC), str(tmp_path / "rate"), "0.02"]
        assert emulation.spawn(argv, 2, network=network, timeout=30) == 0
    total, seconds = (tmp_path / "rate").read_text().split()
    burst = emulation.burst_bytes(10**7)
    # Both directions of htb hold one burst; one TSO packet of up to 64 KiB may borrow ahead.
    assert float(seconds) >= (int(total) - 2 * burst - 2**16) * 8 / 10e6


@pytest.mark.usefixtures("hosts")
def test_hosts_share_the_cores_evenly(tmp_path: Path) -> None:
    mine = sorted(os.sched_getaffinity(0))
    code = python(
        f"""
        import os, pathlib
        cores = sorted(os.sched_getaffinity(0))
        pathlib.Path({str(tmp_path)!r}, os.environ["RANK"]).write_text(repr(cores))
        """
    )
    assert emulation.spawn(code, 3, rate="100mbit", timeout=30) == 0
    found = [ast.literal_eval((tmp_path / str(rank)).read_text()) for rank in range(3)]
    assert found == [mine[rank::3] or [mine[rank % len(mine)]] for rank in range(3)]
    assert sorted(os.sched_getaffinity(0)) == mine


@pytest.mark.usefixtures("hosts")
def test_each_rank_sees_its_own_host(capfd: pytest.CaptureFixture[str]) -> None:
    before = interfaces()
    code = python(
        """
        import os, pathlib
        from commlib import emulation
        names = sorted(p.name for p in pathlib.Path("/sys/class/net").iterdir())
        keys = "RANK WORLD_SIZE LOCAL_RANK MASTER_ADDR MASTER_PORT GLOO_SOCKET_IFNAME"
        print(*(os.environ[key] for key in keys.split()), *names, emulation.sent_bytes() < 10_000)
        print(os.environ["OMP_NUM_THREADS"], os.environ["EXTRA"])
        """
    )
    path = os.pathsep.join(p for p in sys.path if p)
    env = {"EXTRA": "given", "PYTHONPATH": path}
    assert emulation.spawn(code, 2, rate="100mbit", env=env, timeout=30) == 0
    assert capfd.readouterr().out.splitlines() == [
        "0 2 0 10.0.0.1 29500 eth0 eth0 lo True",
        "1 given",
    ]
    assert interfaces() == before


# Ranks 0 and 1 send each other `sys.argv[1]` bytes at their host's address, as gloo does.
NEIGHBOURS = """
    import os, pathlib, socket, sys, time
    from commlib import emulation
    rank, local = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    here = os.environ["LOCAL_WORLD_SIZE"]
    net = os.stat("/proc/self/ns/net").st_ino
    sent = "-"
    if rank < 2:
        server = socket.create_server(("10.0.0.1", 5000 + local))
        pathlib.Path(sys.argv[2], f"up{rank}").touch()
        while not pathlib.Path(sys.argv[2], f"up{1 - rank}").exists():
            time.sleep(0.01)
        link = socket.create_connection(("10.0.0.1", 5001 - local))
        peer, total = server.accept()[0], 0
        link.sendall(bytes(int(sys.argv[1])))
        link.close()
        while data := peer.recv(1 << 16):
            total += len(data)
        sent = emulation.sent_bytes() < total
    pathlib.Path(sys.argv[2], f"rank{rank}").write_text(f"{local} {here} {net} {sent}")
"""


@pytest.mark.usefixtures("hosts")
def test_ranks_of_one_host_talk_inside_it(tmp_path: Path) -> None:
    """5 ranks on 3 hosts are 2, 2 and 1; what two of one host say to each other leaves no eth0."""
    argv = [*python(NEIGHBOURS), "200000", str(tmp_path)]
    env = {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    assert emulation.spawn(argv, 5, hosts=3, env=env, timeout=30) == 0
    seen = [(tmp_path / f"rank{rank}").read_text().split() for rank in range(5)]
    assert [(local, here) for local, here, *_ in seen] == [
        ("0", "2"), ("1", "2"), ("0", "2"), ("1", "2"), ("0", "1"),
    ]  # fmt: skip
    spaces = [space for _, _, space, _ in seen]
    assert [spaces.index(space) for space in spaces] == [0, 0, 2, 2, 4]
    assert [sent for *_, sent in seen[:2]] == ["True", "True"]


def test_loopback_needs_no_namespaces(capfd: pytest.CaptureFixture[str]) -> None:
    code = python(
        """
        import os
        print(os.environ["RANK"], os.environ["LOCAL_RANK"], os.environ["MASTER_ADDR"],
              os.environ["GLOO_SOCKET_IFNAME"])
        """
    )
    assert emulation.spawn(code, 2, timeout=30) == 0
    assert capfd.readouterr().out == "0 0 127.0.0.1 lo\n"


@pytest.mark.parametrize("rate", [None, "100mbit"], ids=["loopback", "hosts"])
def test_a_failed_rank_ends_all_and_is_reported(
    rate: str | None,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    monkeypatch.setattr(ranks, "GRACE_SECONDS", 0.5)
    if rate:
        request.getfixturevalue("hosts")
    before, marker = interfaces(), f"commlib-test-{os.getpid()}-{time.monotonic_ns()}"
    code = python(
        """
        import os, sys, time
        if os.environ["RANK"] == "1":
            sys.exit("rank one gives up")
        time.sleep(100)
        """
    )
    assert emulation.spawn([*code, marker], 3, rate=rate, timeout=60) == 1
    error = capfd.readouterr().err
    assert "rank 1: exit code 1" in error
    assert "rank one gives up" in error
    assert wait_until_gone(marker) == []
    assert interfaces() == before


def test_timeout_kills_all(capfd: pytest.CaptureFixture[str]) -> None:
    marker = f"commlib-test-{os.getpid()}-{time.monotonic_ns()}"
    code = [*python("import time; time.sleep(100)"), marker]
    assert emulation.spawn(code, 2, timeout=0.5) == 124
    assert "ranks [0, 1] still ran after 0.5 s" in capfd.readouterr().err
    assert wait_until_gone(marker) == []


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("rate", [None, "100mbit"], ids=["loopback", "hosts"])
def test_nothing_survives_the_launcher(
    rate: str | None, end: signal.Signals, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if rate:
        request.getfixturevalue("hosts")
    elif not ranks._until_parent_ends():
        pytest.skip("setpriv --pdeathsig is not available")
    before, marker = interfaces(), f"commlib-test-{os.getpid()}-{time.monotonic_ns()}"
    started = tmp_path / "started"
    rank = "import pathlib, sys, time; pathlib.Path(sys.argv[2]).touch(); time.sleep(100)"
    launcher = f"""
        import signal, sys
        from commlib import emulation
        signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in the background
        argv = [sys.executable, "-c", {rank!r}, {marker!r}, {str(started)!r}]
        emulation.spawn(argv, 2, rate={rate!r}, timeout=60)
    """
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    with subprocess.Popen(python(launcher), env=env, stderr=subprocess.DEVNULL) as process:
        limit = time.monotonic() + 30
        while not (started.exists() and len(alive(marker)) >= 2) and time.monotonic() < limit:
            time.sleep(0.02)
        assert len(alive(marker)) >= 2
        process.send_signal(end)
    assert wait_until_gone(marker) == []
    assert interfaces() == before
