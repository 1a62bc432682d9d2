"""The house holds its floors, stays readable, and does nothing when it is imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.architecture import violations

ROOT = Path(__file__).resolve().parent.parent
MAX_LINES = 450


def house() -> tuple[dict[str, str], frozenset[str]]:
    sources, packages = {}, set()
    for base in (ROOT / "commlib", ROOT / "kernels" / "commlib_kernels"):
        for path in base.rglob("*.py"):
            parts = path.relative_to(base.parent).with_suffix("").parts
            if parts[-1] == "__init__":
                parts = parts[:-1]
                packages.add(".".join(parts))
            sources[".".join(parts)] = path.read_text()
    return sources, frozenset(packages)


def test_imports_go_down_only() -> None:
    sources, packages = house()
    assert {"commlib", "commlib_kernels"} <= sources.keys()
    found = violations(sources, packages)
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("sources", "complaint"),
    [
        ({"commlib.feedback": "from commlib.communicator import Communicator"}, "of floor 4"),
        ({"commlib.feedback": "import commlib.communicator as c"}, "of floor 4"),
        ({"commlib.codecs.cast": "from .. import policy"}, "imports commlib.policy of floor 2"),
        ({"commlib.codecs.cast": "from ..policy import Policy"}, "commlib.policy of floor 2"),
        ({"commlib.codecs.cast": "def f():\n    import commlib.policy"}, ":2: floor 1 imports"),
        ({"commlib.policy": "from commlib import codec"}, "imports commlib of floor 5"),
        ({"commlib.policy": "if TYPE_CHECKING:\n    import commlib.cli"}, "of floor 6"),
        ({"commlib_kernels.layout": "from commlib.codecs import codec"}, "of floor 1"),
        ({"commlib_kernels.layout": "import commlib"}, "imports commlib of floor 5"),
        ({"commlib_kernels.layout": "import torch.distributed as dist"}, "below floor 5"),
        ({"commlib.collectives.ring": "from torch import distributed"}, "below floor 5"),
        ({"commlib.telemetry": "from torch.distributed import get_rank"}, "below floor 5"),
        ({"commlib.planner.auto": "import torch\ntorch.distributed.barrier()"}, "below floor 5"),
        ({"commlib.helpers": ""}, "has no floor"),
        (
            {
                "commlib.policy": "from commlib.feedback import Plain",
                "commlib.feedback": "import commlib.policy",
            },
            "ring of imports",
        ),
    ],
)
def test_a_violation_is_found(sources: dict[str, str], complaint: str) -> None:
    found = violations(sources)
    assert len(found) == 1
    assert complaint in found[0]


@pytest.mark.parametrize(
    "sources",
    [
        {"commlib.policy": "from commlib.feedback import Plain", "commlib.feedback": ""},
        {"commlib.codecs": "from . import base", "commlib.codecs.base": "import torch"},
        {"commlib.transport": "import torch.distributed as dist"},
        {"commlib.integrations.ddp": "from torch.distributed import ProcessGroup"},
        {"commlib.cli": "from commlib import wrap\nimport commlib.demo"},
        {"commlib.codecs": "import commlib_kernels.numba_cpu\nimport torch.distributions"},
        {
            "commlib.policy": "from commlib.feedback import Plain",
            "commlib.feedback": "def f():\n    import commlib.policy",
        },
    ],
)
def test_what_is_allowed_passes(sources: dict[str, str]) -> None:
    assert violations(sources, frozenset({"commlib.codecs"})) == []


def test_no_file_is_too_long() -> None:
    folders = [ROOT / "commlib", ROOT / "kernels", ROOT / "tests", ROOT / "bench"]
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text().splitlines())
        for path in files
        if path.suffix in {".py", ".cu", ".cuh"}
    }
    too_long = {name: count for name, count in lengths.items() if count > MAX_LINES}
    assert not too_long, f"over {MAX_LINES} lines, split by idea: {too_long}"


def test_importing_commlib_does_nothing() -> None:
    program = """
import os, sys, threading
before = len(os.listdir("/proc/self/task"))
import commlib
heavy = {"cupy", "matplotlib", "numba", "numba_cuda", "sklearn", "torch"} & sys.modules.keys()
assert not heavy, f"import commlib imports {sorted(heavy)}"
assert threading.active_count() == 1, threading.enumerate()
assert len(os.listdir("/proc/self/task")) == before
assert commlib.__version__
assert set(commlib.__all__) <= set(dir(commlib))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr


def test_public_names_are_there_and_others_are_refused() -> None:
    import commlib

    for name in commlib.__all__:
        assert getattr(commlib, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'compress'"):
        _ = commlib.compress
