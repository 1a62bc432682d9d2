"""The wheel holds both packages and nothing else, and works beside PyPI's package `kernels`; the
source distribution holds what `make demo` and `make test` need.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
REAL_KERNELS = 'NAME = "the real one"\n'


def python(*args: str, cwd: Path, path: Path) -> str:
    """Run this interpreter without its environment's variables, only `path` in front."""
    done = subprocess.run(
        [sys.executable, *args],
        cwd=cwd,
        env={"PATH": "/usr/bin:/bin", "HOME": str(cwd), "PYTHONPATH": str(path)},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: setuptools leaves its build folder beside the sources."""
    tmp = tmp_path_factory.mktemp("packaging")
    source = tmp / "source"
    litter = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("commlib", "kernels", "tests"):
        shutil.copytree(ROOT / name, source / name, ignore=litter)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = ("-m", "pip", "--disable-pip-version-check", "wheel", "--quiet")
    python(*pip, "--no-build-isolation", "--no-deps", "-w", str(tmp), ".", cwd=source, path=tmp)
    (built,) = tmp.glob("*.whl")
    return built


def test_source_distribution_holds_what_make_needs(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    litter = shutil.ignore_patterns("__pycache__", "*.egg-info", "local")
    for path in ROOT.iterdir():
        if path.name in ("bench", "commlib", "kernels", "tests"):
            shutil.copytree(path, source / path.name, ignore=litter)
        elif path.is_file():
            shutil.copy(path, source)
    build = "from setuptools.build_meta import build_sdist as build; build('.')"
    python("-c", build, cwd=source, path=tmp_path)
    (built,) = source.glob("*.tar.gz")
    with tarfile.open(built) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    assert {"Makefile", "constraints.txt", "CHANGELOG.md", "kernels/README.md"} <= held
    for folder in ("bench", "commlib", "kernels", "tests"):
        files = (path for path in (source / folder).rglob("*") if path.is_file())
        here = {str(path.relative_to(source)) for path in files if path.suffix != ".pyc"}
        assert here <= held


def test_wheel_holds_both_packages_and_no_tests(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {
        str(path.relative_to(base))
        for base, package in ((ROOT, "commlib"), (ROOT / "kernels", "commlib_kernels"))
        for path in (base / package).rglob("*")
        if path.suffix in {".py", ".cu", ".cuh"} or path.name == "py.typed"
    }
    assert {"commlib/py.typed", "commlib_kernels/py.typed"} <= expected
    assert {name for name in names if ".dist-info/" not in name} == expected
    assert wheel.name.startswith("commlib_torch-")
    assert any(name.endswith("/licenses/LICENSE") for name in names)


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder it is installed in."""
    tmp = tmp_path_factory.mktemp("installed")
    pip = ("-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-deps")
    python(*pip, "--target", str(tmp / "site"), str(wheel), cwd=tmp, path=tmp / "site")
    return tmp / "site"


def test_installed_wheel_imports_beside_the_real_kernels_package(
    site: Path, tmp_path: Path
) -> None:
    (site / "kernels").mkdir()
    (site / "kernels" / "__init__.py").write_text(REAL_KERNELS)
    packages = ["commlib", "commlib_kernels", "kernels"]
    program = "".join(f"import {name}; print({name}.__file__)\n" for name in packages)
    files = python("-c", program, cwd=tmp_path, path=site).splitlines()
    assert files == [str(site / name / "__init__.py") for name in packages]


def test_torch_knows_the_backend_of_an_installed_wheel(site: Path, tmp_path: Path) -> None:
    """In a script that imports nothing of commlib."""
    program = """
import sys, torch, torch.distributed as dist
home = sys.modules["commlib"].__file__
assert not {"commlib.communicator", "numba"} & sys.modules.keys()
dist.init_process_group("commlib", store=dist.HashStore(), rank=0, world_size=1)
dist.all_reduce(torch.ones(3))
print(dist.get_backend(), home)
dist.destroy_process_group()
"""
    said = python("-c", program, cwd=tmp_path, path=site)
    assert said == f"commlib {site / 'commlib' / '__init__.py'}\n"


def test_real_kernels_package_wins_in_a_checkout(tmp_path: Path) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text(REAL_KERNELS)
    # -c puts the checkout, with its folder `kernels`, in front of everything else
    assert python("-c", "import kernels; print(kernels.NAME)", cwd=ROOT, path=tmp_path) == (
        "the real one\n"
    )


def test_modules_of_the_readme_are_there_on_first_use(tmp_path: Path) -> None:
    program = """
import sys, commlib
assert not {"commlib.checkpoint", "commlib.optim", "commlib.distributed"} & sys.modules.keys()
found = commlib.checkpoint.load, commlib.optim.DiLoCo, commlib.distributed.send
print(*(one.__name__ for one in found))
"""
    assert python("-c", program, cwd=ROOT, path=tmp_path) == "load DiLoCo send\n"
