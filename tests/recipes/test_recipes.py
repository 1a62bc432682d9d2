"""Every recipe trains, sends as many bytes fewer as its scheme says, and loses nothing by it."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from commlib import emulation
from commlib.emulation import Network
from tests.recipes.starter import imports

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
INSTALLED = ("accelerate", "lightning", "transformers")
LAST_LINE = re.compile(r"loss (\S+) -> (\S+?)(?:, (\d+) bytes sent by this rank)?$", re.M)
# int8 in blocks of 128 with a scale of 2 bytes: 4 / (1 + 2 / 128) = 3.94 times fewer for matrices;
# vectors, 0.3% to 1% of these models, stay fp32.
FEWER = 3.7
SECONDS = 300  # for a busy machine; a recipe takes some seconds

pytestmark = [pytest.mark.processes, pytest.mark.timeout(2 * SECONDS)]


class Recipe(NamedTuple):
    """A script, its ranks and the scheme that is compared with fp32."""

    script: str
    ranks: int = 2
    policy: str = "int8+ef"


RECIPES = [
    Recipe("ddp.py"),
    Recipe("backend.py", policy="int8"),
    Recipe("amp_accumulation.py"),
    Recipe("fsdp2_pp.py", 4, "int8"),
    Recipe("accelerate_ddp.py"),
    Recipe("lightning_ddp.py"),
    Recipe("hf_trainer.py"),
]


class Run(NamedTuple):
    """What a recipe printed last, and what its ranks sent in all, by the interface's counter."""

    first: float
    last: float
    sent: int | None
    counted: int
    text: str


def parse(text: str, counted: int = 0) -> Run:
    found = LAST_LINE.search(text)
    assert found, f"no last line in {text!r}"
    sent = None if found[3] is None else int(found[3])
    return Run(float(found[1]), float(found[2]), sent, counted, text)


def environment(**more: str) -> dict[str, str]:
    """Of a user's shell that has this Python first; kernels need not be compiled for this."""
    return os.environ | {
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]),
        "COMMLIB_BACKEND": "reference",
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        **more,
    }


def need(script: Path) -> None:
    """Skip without the frameworks of `script`, or fail where COMMLIB_REQUIRE names `recipes`."""
    missing = [
        n for n in imports(str(script)) if n in INSTALLED and not importlib.util.find_spec(n)
    ]
    if missing and "recipes" in os.environ.get("COMMLIB_REQUIRE", "").split(","):
        pytest.fail(f"COMMLIB_REQUIRE names recipes, and {', '.join(missing)} is not installed")
    if missing:
        pytest.skip(f"{', '.join(missing)} is not installed: pip install '.[recipes]'")


def train(recipe: Recipe) -> dict[str, Run]:
    """The recipe under its policy and under fp32, on a loopback of its own where there can be."""
    script, policies = str(HERE / recipe.script), (recipe.policy, "fp32")
    argv = [sys.executable, "-m", "tests.recipes.starter", script, str(recipe.ranks), *policies]
    apart = emulation.available() is None

    def start(argv: list[str]) -> str:
        done = subprocess.run(
            argv, env=environment(), timeout=SECONDS, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    if apart:
        with Network(1) as network:
            output = start(network.command(0, argv))
    else:
        output = start(argv)
    runs = {}
    for row in map(json.loads, output.splitlines()):
        assert set(row["codes"]) == {0}, "\n".join(row["outputs"])
        text = next(text for text in row["outputs"] if LAST_LINE.search(text))
        runs[row["policy"]] = parse(text, row["sent"] if apart else 0)
    return runs


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.script)
def test_recipe(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    need(HERE / recipe.script)
    monkeypatch.chdir(tmp_path)  # output is left there, also of ranks on emulated hosts
    runs = train(recipe)
    ours, plain = runs[recipe.policy], runs["fp32"]
    for run in (ours, plain):
        assert run.last < 0.8 * run.first, run.text
    # An int8 gradient is off by 0.5%, and feedback gives it back: far less than a seed changes.
    assert ours.last == pytest.approx(plain.last, rel=0.05)
    symmetric = recipe.ranks == 2 and ours.sent is not None and plain.sent is not None
    if symmetric:  # of an uncompressed FSDP2 model gloo sends most, and commlib knows nothing
        assert plain.sent > FEWER * ours.sent
    if plain.counted:  # with connecting, and the weights that DDP sends when it is made
        assert plain.counted > 3 * ours.counted, (plain.counted, ours.counted)
    if plain.counted and symmetric:  # these are in both, and the difference is as they say
        saved = plain.counted - ours.counted
        assert saved == pytest.approx(2 * (plain.sent - ours.sent), rel=0.05)
    if recipe.script == "amp_accumulation.py":
        skipped = re.search(r"(\d+) steps skipped", ours.text)
        assert skipped, ours.text
        assert int(skipped[1]) > 0, ours.text


def test_a_run_without_a_last_line_is_seen() -> None:
    with pytest.raises(AssertionError, match="no last line"):
        parse("epoch 0: loss 2.1\n")
    assert parse("loss 2.5 -> 1.5, 70 bytes sent by this rank\n")[:3] == (2.5, 1.5, 70)
    assert parse("loss 2.5 -> 1.5\n")[:3] == (2.5, 1.5, None)


def launch(commands: list[list[str]], **env: str) -> list[str]:
    """Run commands side by side; what each printed."""

    def start(command: list[str]) -> subprocess.Popen[str]:
        out, both = subprocess.PIPE, subprocess.STDOUT
        return subprocess.Popen(command, env=environment(**env), stdout=out, stderr=both, text=True)

    started = [start(command) for command in commands]
    try:
        outputs = [process.communicate(timeout=SECONDS)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0] * len(started), "\n".join(outputs)
    return outputs


def hosts() -> Network:
    if reason := emulation.available():
        pytest.skip(reason)
    return Network(2)


def test_several_hosts() -> None:
    """torchrun joins two hosts; the shell's own words."""
    with hosts() as network:
        script = [str(HERE / "several_hosts.sh")]
        commands = [
            network.command(host, [*script, str(host), str(HERE / "ddp.py")]) for host in (0, 1)
        ]
        outputs = launch(commands, NODES="2", HEAD=network.address(0))
    run = parse(outputs[0])
    assert run.last < 0.8 * run.first


SRUN = """#!/usr/bin/env bash
# The part of srun that the recipe needs: its command as two tasks, each on a host of its own.
for task in 0 1; do
    enter="ON_HOST_$task"
    SLURM_PROCID=$task SLURM_NTASKS=2 SLURM_LOCALID=0 ${!enter} "$@" &
    tasks+=($!)
done
wait "${tasks[0]}" && wait "${tasks[1]}"
"""
SCONTROL = """#!/usr/bin/env bash
[[ "$*" == "show hostnames node[0-1]" ]] || exit 1
for node in "$HEAD" node1; do
    echo "$node"
    sleep 0.2 # whoever reads one line alone is gone by the next
done
"""


def test_slurm(tmp_path: Path) -> None:
    """With SLURM's commands played by two that set what it sets."""
    for name, text in {"srun": SRUN, "scontrol": SCONTROL}.items():
        path = tmp_path / name
        path.write_text(text)
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    with hosts() as network:
        env = {f"ON_HOST_{host}": " ".join(network.command(host, [])) for host in (0, 1)}
        env |= {"HEAD": network.address(0), "SLURM_JOB_NODELIST": "node[0-1]"}
        env |= {"SLURM_JOB_ID": "77", "SLURM_CPUS_PER_TASK": "1"}
        path = os.pathsep.join([str(tmp_path), environment()["PATH"]])
        command = [str(HERE / "slurm.sbatch"), str(HERE / "ddp.py")]
        run = parse(launch([command], PATH=path, **env)[0])
    assert run.last < 0.8 * run.first


@pytest.mark.parametrize("name", ["several_hosts.sh", "slurm.sbatch"])
def test_shell_scripts_parse(name: str) -> None:
    subprocess.run(["bash", "-n", str(HERE / name)], check=True, timeout=30)


def test_every_recipe_is_listed_and_run() -> None:
    scripts = {path.name for path in HERE.iterdir() if path.suffix in {".py", ".sh", ".sbatch"}}
    scripts -= {"__init__.py", "starter.py", "test_recipes.py"}
    listed: Any = re.findall(r"^\| \[(\S+?)\]\(\1\)", (HERE / "README.md").read_text(), re.M)
    assert set(listed) == scripts
    assert {recipe.script for recipe in RECIPES} | {"several_hosts.sh", "slurm.sbatch"} == scripts
