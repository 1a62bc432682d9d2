"""The doctor says what is wrong, what to do, and exits with 1 only for a fault."""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from commlib import doctor
from commlib.doctor import interfaces, network, software
from commlib.doctor.finding import Finding, Status, fault, ok, warn
from commlib.doctor.network import Probe


def found(findings: Iterator[Finding]) -> dict[str, Finding]:
    return {finding.what: finding for finding in findings}


def statuses(findings: Iterator[Finding]) -> set[Status]:
    return {finding.status for finding in findings}


def test_a_finding_says_what_to_do_on_a_line_of_its_own() -> None:
    assert str(ok("torch", "2.13.0")) == "OK     torch: 2.13.0"
    assert str(warn("cuda", "no driver", "install it")).splitlines() == [
        "WARN   cuda: no driver",
        "       -> install it",
    ]


# ---------------------------------------------------------------- the report


def test_a_fault_makes_the_exit_code_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken() -> Iterator[Finding]:
        yield fault("torch", "2.0", "pip install 'torch>=2.11'")

    monkeypatch.setattr(doctor, "CHECKS", (broken,))
    assert doctor.run(probe=False) == 1
    assert "FAULT  torch: 2.0\n       -> pip install" in capsys.readouterr().out


def test_under_json_other_ranks_say_on_stderr_what_is_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken() -> Iterator[Finding]:
        yield fault("torch", "2.0", "upgrade")
        yield ok("python", "3.11")

    monkeypatch.setattr(doctor, "CHECKS", (broken,))
    for rank, expected in (("0", ""), ("1", "rank 1: FAULT  torch: 2.0\n       -> upgrade\n")):
        monkeypatch.setenv("RANK", rank)
        assert doctor.run(probe=False, as_json=True) == 1
        out, err = capsys.readouterr()
        assert err == expected
        assert bool(out) == (rank == "0")


def test_warnings_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    def grumbling() -> Iterator[Finding]:
        yield warn("gloo interface", "lo", "export GLOO_SOCKET_IFNAME=eth0")

    monkeypatch.setattr(doctor, "CHECKS", (grumbling,))
    assert doctor.run(probe=False) == 0


def test_a_check_that_breaks_is_a_fault_and_the_others_go_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def kernel_cache() -> Iterator[Finding]:
        raise OSError("disk is gone")
        yield

    def fine() -> Iterator[Finding]:
        yield ok("python", "3.11")

    monkeypatch.setattr(doctor, "CHECKS", (kernel_cache, fine))
    assert doctor.run(probe=False, as_json=True) == 1
    report = json.loads(capsys.readouterr().out)
    assert [f["status"] for f in report["findings"]] == ["FAULT", "OK"]
    assert "disk is gone" in report["findings"][0]["found"]
    assert report["fault"] is True
    assert report["probe"] is None


def test_a_bad_variable_is_a_fault_of_the_whole_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COMMLIB_POLICY", "int9+ef")
    assert doctor.run(probe=False) == 1
    out = capsys.readouterr().out
    assert "FAULT  COMMLIB_POLICY: int9+ef" in out
    assert "kernels on cpu" in out  # the others went on


# ---------------------------------------------------------------- software


@pytest.mark.parametrize(
    ("variables", "status", "text"),
    [
        ({"COMMLIB_POLICY": "int8+ef"}, Status.OK, "int8+ef"),
        ({"COMMLIB_POLICY": "auto"}, Status.OK, "auto"),
        ({"COMMLIB_POLICY": "int99"}, Status.FAULT, "int99"),
        ({"COMMLIB_BACKEND": "reference"}, Status.OK, "reference"),
        ({"COMMLIB_BACKEND": "numba"}, Status.FAULT, "numba_cpu"),
        ({"COMMLIB_CHECK": "1"}, Status.OK, "1"),
        ({"COMMLIB_CHECK": "yes"}, Status.FAULT, "0 or 1"),
        ({"COMMLIB_POLICE": "x"}, Status.WARN, "COMMLIB_POLICY?"),
    ],
)
def test_environment(variables: dict[str, str], status: Status, text: str) -> None:
    (finding,) = software.environment(variables)
    assert finding.status is status
    assert text in str(finding)


@pytest.mark.parametrize(
    ("driver", "build", "wheels", "status", "text"),
    [
        (None, None, {}, {Status.OK}, "CPU build"),
        ((13, 0), None, {}, {Status.WARN}, "install torch's CUDA build"),
        (None, "12.8", {}, {Status.WARN}, "no driver"),
        ((12, 4), "12.8", {}, {Status.OK}, "driver for 12.4"),
        ((12, 8), "13.0", {}, {Status.FAULT}, "newer driver"),
        ((13, 0), "13.0", {"cupy-cuda13x": "14.2"}, {Status.OK}, "cupy-cuda13x"),
        ((13, 0), "13.0", {"cupy-cuda12x": "14.2"}, {Status.OK, Status.FAULT}, "extra cuda13"),
        (
            (13, 0),
            "13.0",
            {"cupy-cuda12x": "14.2", "cupy-cuda13x": "14.2"},
            {Status.OK, Status.FAULT},
            "uninstall all",
        ),
        ((13, 0), "13.0", {"numba-cuda": "0.30"}, {Status.OK, Status.FAULT}, "numba-cuda[cu13]"),
        (
            (13, 0),
            "13.0",
            {"numba-cuda": "0.30", "cuda-bindings": "12.9.4"},
            {Status.OK, Status.FAULT},
            "cuda-bindings 12.9.4",
        ),
    ],
)
def test_cuda_wheels_against_torch_and_driver(
    driver: tuple[int, int] | None,
    build: str | None,
    wheels: dict[str, str],
    status: set[Status],
    text: str,
) -> None:
    findings = list(software.cuda_match(driver, build, wheels))
    assert statuses(iter(findings)) == status
    assert text in "\n".join(map(str, findings))


def test_an_old_or_missing_package_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(software, "OLDEST", {"torch": (99, 0), "no_such_package": (1, 0)})
    findings = found(software.python_and_packages())
    assert findings["torch"].status is Status.FAULT
    assert "torch>=99.0" in findings["torch"].todo
    assert findings["no_such_package"].status is Status.FAULT
    assert findings["python"].status is (
        Status.OK if sys.version_info[:2] <= software.PYTHONS[1] else Status.WARN
    )


def test_versions_compare_by_their_numbers() -> None:
    assert software.numbers("2.13.0+cpu") == (2, 13)
    assert software.numbers("2.9") < software.numbers("2.11.0rc1")


def test_the_backend_that_was_named_must_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMMLIB_BACKEND", "cupy")
    (finding,) = software.backends()
    assert finding.status is Status.FAULT
    assert "COMMLIB_BACKEND" in finding.found


@pytest.mark.parametrize(
    ("kernels", "named", "status", "text"),
    [
        (1, True, Status.OK, "1 kernels"),
        (0, True, Status.WARN, "commlib warmup"),
        (1, False, Status.WARN, "COMMLIB_CACHE"),
    ],
)
def test_kernel_cache(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    kernels: int,
    named: bool,
    status: Status,
    text: str,
) -> None:
    for number in range(kernels):
        (tmp_path / f"{number}.nbc").touch()
    monkeypatch.setattr("commlib_kernels.numba_cpu.jit.cache_dir", lambda: tmp_path)
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path.parent))
    monkeypatch.delenv("COMMLIB_CACHE", raising=False)
    if named:
        monkeypatch.setenv("COMMLIB_CACHE", str(tmp_path))
    (finding,) = software.kernel_cache()
    assert finding.status is status
    assert text in str(finding)


def test_a_named_cache_that_is_not_used_is_a_warning(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "1.nbc").touch()
    monkeypatch.setattr("commlib_kernels.numba_cpu.jit.cache_dir", lambda: tmp_path)
    monkeypatch.setenv("COMMLIB_CACHE", "/proc/nobody")
    (finding,) = software.kernel_cache()
    assert finding.status is Status.WARN
    assert "COMMLIB_CACHE=/proc/nobody cannot be written" in finding.found


def test_a_cache_that_cannot_be_written_is_a_fault(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("commlib_kernels.numba_cpu.jit.cache_dir", lambda: tmp_path / "gone")
    (finding,) = software.kernel_cache()
    assert finding.status is Status.FAULT
    assert "COMMLIB_CACHE" in finding.todo


# ---------------------------------------------------------------- network


def test_this_host_has_loopback() -> None:
    assert interfaces.addresses()["lo"] == "127.0.0.1"
    assert interfaces.speed("lo") is None
    assert interfaces.speed("no_such_interface") is None


def test_gloo_takes_the_interface_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    assert interfaces.gloo() == ("lo", "GLOO_SOCKET_IFNAME=lo")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth77")
    (finding,) = network.interface()
    assert finding.status is Status.FAULT
    assert "eth77" in finding.found
    assert "lo (127.0.0.1)" in finding.todo


@pytest.mark.parametrize(
    ("own", "name", "status"),
    [
        (["127.0.0.1"], "lo", Status.WARN),
        (["127.0.1.1"], "lo", Status.WARN),
        (["192.0.2.1"], None, Status.FAULT),
        (None, "lo", Status.WARN),
    ],
)
def test_gloo_without_a_variable_follows_the_host_name(
    monkeypatch: pytest.MonkeyPatch, own: list[str] | None, name: str | None, status: Status
) -> None:
    def getaddrinfo(*_: object) -> list[tuple[int, int, int, str, tuple[str, int]]]:
        if own is None:
            raise OSError("Name or service not known")
        return [(2, 1, 6, "", (address, 0)) for address in own]

    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    assert interfaces.gloo()[0] == name
    (finding,) = network.interface()
    assert finding.status is status


@pytest.mark.parametrize(
    ("rate", "speed", "same_host", "status", "text"),
    [
        (8e9, 1e9, True, Status.OK, "8 Gbit/s between two ranks"),
        (8e9, 100e9, True, Status.WARN, "processor"),
        (0.9e9, 1e9, False, Status.OK, "interface 1 Gbit/s"),
        (0.1e9, 1e9, False, Status.WARN, "half of the line"),
        (8e9, None, True, Status.OK, "of unknown speed"),
    ],
)
def test_the_rate_is_held_against_the_interface(
    rate: float, speed: float | None, same_host: bool, status: Status, text: str
) -> None:
    (finding,) = network.judge(Probe(2, rate, "", ""), speed, same_host=same_host)
    assert finding.status is status
    assert text in str(finding)


def test_ranks_that_cannot_talk_are_a_fault(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def probe() -> Probe:
        raise RuntimeError("two ranks over lo ended with exit code 1")

    monkeypatch.setattr(doctor, "CHECKS", ())
    monkeypatch.setattr(network, "probe", probe)
    assert doctor.run() == 1
    assert "FAULT  gloo rate: two ranks over lo" in capsys.readouterr().out


JOB = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("changes", "status", "text"),
    [
        ({}, Status.WARN, "one rank sends nothing, so there is nothing to measure"),
        ({"MASTER_ADDR": None}, Status.FAULT, "also needs MASTER_ADDR\n"),
        ({"RANK": "x"}, Status.FAULT, "RANK=x is not a whole number"),
        ({"MASTER_PORT": ""}, Status.FAULT, "also needs MASTER_PORT\n"),
        (
            {"WORLD_SIZE": None, "MASTER_ADDR": None, "MASTER_PORT": None},
            Status.FAULT,
            "also needs WORLD_SIZE, MASTER_ADDR, MASTER_PORT\n",
        ),
        ({"WORLD_SIZE": "two"}, Status.FAULT, "WORLD_SIZE=two is not a whole number"),
        ({"MASTER_PORT": "\u00b2"}, Status.FAULT, "MASTER_PORT=\u00b2 is not a whole number"),
        ({"WORLD_SIZE": "0"}, Status.FAULT, "RANK=0 is not below WORLD_SIZE=0"),
    ],
)
def test_a_job_that_cannot_be_measured_is_told_before_it_is_joined(
    changes: dict[str, str | None],
    status: Status,
    text: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, value in {**JOB, **changes}.items():
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    monkeypatch.setattr(doctor, "CHECKS", ())
    assert doctor.run() == (status is Status.FAULT)
    out = capsys.readouterr().out
    assert out.startswith(f"{status}")
    assert text in out
    assert "unset RANK" in out
    assert doctor.run(as_json=True) == (status is Status.FAULT)
    report = json.loads(capsys.readouterr().out)
    assert [finding["status"] for finding in report["findings"]] == [status]
    assert report["probe"] is None


def test_a_job_that_torch_refuses_is_a_fault(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def probe() -> Probe:
        raise ValueError("unknown backend")

    assert network.obstacle({}) is network.obstacle({**JOB, "WORLD_SIZE": "2"}) is None
    monkeypatch.setattr(doctor, "CHECKS", ())
    monkeypatch.setattr(network, "probe", probe)
    assert doctor.run(as_json=True) == 1
    assert json.loads(capsys.readouterr().out)["findings"][0]["found"] == "unknown backend"


@pytest.mark.bench
def test_two_real_ranks_measure_this_host(capsys: pytest.CaptureFixture[str]) -> None:
    assert "RANK" not in os.environ
    assert doctor.run(as_json=True) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["probe"]["ranks"] == 2
    assert report["probe"]["bits_per_second"] > 0
    assert "int8" in report["probe"]["breakeven"]
    assert "auto" in report["probe"]["choices"]
    assert {"python", "torch", "kernels on cpu", "gloo rate"} <= {
        f["what"] for f in report["findings"]
    }
