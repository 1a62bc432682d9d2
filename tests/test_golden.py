"""Every backend writes the golden bytes; the golden files are not overwritten by accident."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from commlib.codecs import BEHIND, CODECS, STAGES, codec
from commlib_kernels import Layout, Tag, nbytes
from commlib_kernels.layout import pieces
from tests.contract import backends, require
from tests.golden import make
from tests.golden.make import HERE, TABLE, made, path

ROOT = HERE.parent.parent
WITH_BACKENDS = [
    (name, *row)
    for name in backends()
    for row in TABLE
    if name != "cuda_host" or (codec(row[1]).format.on_cuda and row[0] != "entropy")
]


@pytest.mark.parametrize(("name", "method", "text"), WITH_BACKENDS)
def test_bytes_are_the_golden_ones(name: str, method: str, text: str) -> None:
    want, got = path(method, text).read_bytes(), made(require(name), method, text)
    assert len(got) == len(want)
    wrong = [i for i, (a, b) in enumerate(zip(got, want, strict=True)) if a != b]
    assert not wrong, f"{len(wrong)} of {len(want)} bytes differ, first at {wrong[0]}"


def test_every_codec_and_every_file_is_in_the_table() -> None:
    parts = {part.partition(":")[0] for _, text in TABLE for part in text.split("|")}
    assert parts == {*CODECS, *STAGES, *BEHIND}
    assert set(HERE.rglob("*.bin")) == {path(method, text) for method, text in TABLE}
    assert all(codec(text).__module__ == f"commlib.codecs.{method}" for method, text in TABLE)


def test_golden_files_are_not_overwritten(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    golden = path("uniform", "int4").read_bytes()
    monkeypatch.setattr(make, "HERE", tmp_path)
    monkeypatch.setattr(make, "TABLE", [("uniform", "int4"), ("sign", "sign")])

    def run(*options: str) -> None:
        monkeypatch.setattr("sys.argv", ["make", *options])
        make.main()

    run()
    file = tmp_path / "uniform" / "int4.bin"
    assert file.read_bytes() == golden
    file.write_bytes(b"other")
    with pytest.raises(SystemExit, match="a change of bytes is a new wire version"):
        run()
    assert file.read_bytes() == b"other"
    run("--force")
    assert file.read_bytes() == golden
    assert len(list(tmp_path.rglob("*.bin"))) == 2


def test_the_example_in_the_readme_is_true() -> None:
    """int4:block=32 of twelve numbers and three exact ones: the hex in kernels/README.md."""
    text = (ROOT / "kernels" / "README.md").read_text()
    block = re.search(r"```hex\n(.*?)```", text, re.DOTALL)
    assert block is not None
    want = bytes.fromhex("".join(line.partition("|")[0] for line in block[1].splitlines()))
    fmt = codec("int4:block=32").format
    layout = Layout((12, 3), exact=(False, True))
    x = torch.tensor([0.5, -1, 1.5, 2, -2.5, 3, -3.5, 0, 0.25, 0.75, -0.1, 7, 1, -2, 0.5])
    for name in backends():
        wire = torch.zeros(nbytes(layout, fmt), dtype=torch.uint8)
        require(name).quantize(fmt, x, wire, layout, Tag(), None)
        assert wire.numpy().tobytes() == want
    assert [(p.code, p.scale) for p in pieces(layout, fmt)] == [(0, 16), (32, 18)]
