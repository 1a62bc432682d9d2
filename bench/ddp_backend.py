"""One DDP script, run twice: `--backend gloo` and `--backend commlib` with COMMLIB_POLICY=int8.

    python -m bench.ddp_backend           4 emulated hosts, 1 Gbit/s; exit code 1 where a bar fails
    python -m bench.ddp_backend --json    append the row to results/ddp_backend.jsonl

The script (`bench/ddp_script.py`) is the same in both, and imports nothing of commlib: torch finds
the backend by the entry point that installing commlib leaves. In a checkout this command writes
that entry point into a folder of its own on PYTHONPATH. Bytes are those that the interfaces of all
hosts have sent from step 2 to the end, headers included, as the kernel counts them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import tomllib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from commlib.benchmark.rows import origin
from commlib.emulation import available, spawn

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "bench" / "ddp_script.py"
RESULTS = ROOT / "bench" / "results" / "ddp_backend.jsonl"
POLICY = "int8"
FIRST = 2  # DDP has rebuilt its buckets, kernels are compiled, plans are agreed
LAST = 10  # steps whose mean is the final loss
LOSS_BAR, BYTES_BAR = 0.01, 3.8


@dataclass(frozen=True)
class Row:
    """Both runs. Losses: means over ranks and the last steps; bytes: of all ranks."""

    policy: str
    ranks: int
    rate: str
    steps: int
    gloo_loss: float
    commlib_loss: float
    gloo_bytes: int
    commlib_bytes: int
    fewer: float
    loss_change: float
    passed: bool
    device: str = field(default_factory=lambda: origin().device)
    versions: dict[str, str] = field(default_factory=lambda: origin().versions)
    commit: str | None = field(default_factory=lambda: origin().commit)


def entry_points(folder: Path) -> None:
    """Write into `folder` what pip leaves beside a package: its name, its entry points."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    info = folder / f"{project['name'].replace('-', '_')}-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: 0\n")
    lines = []
    for group, points in project["entry-points"].items():
        lines += [f"[{group}]", *(f"{name} = {target}" for name, target in points.items())]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")


def run(backend: str, ranks: int, rate: str, steps: int, folder: Path) -> tuple[float, int]:
    """The final loss, and the bytes sent from step `FIRST` to the end."""
    log = folder / backend
    paths = [str(folder), str(ROOT), str(ROOT / "kernels")]
    code = spawn(
        [
            sys.executable, str(SCRIPT), "--backend", backend, "--steps", str(steps),
            "--log", str(log),
        ],
        ranks,
        rate=rate,
        env={"PYTHONPATH": ":".join(paths), "COMMLIB_POLICY": POLICY},
        timeout=3600.0,
    )  # fmt: skip
    if code:
        raise SystemExit(f"--backend {backend} ended with exit code {code}")
    losses, sent = [], 0
    for rank in range(ranks):
        rows = [json.loads(line) for line in Path(f"{log}-{rank}.jsonl").read_text().splitlines()]
        losses += [row["loss"] for row in rows[-LAST:]]
        sent += rows[-1]["tx_bytes"] - rows[FIRST - 1]["tx_bytes"]
    return statistics.fmean(losses), sent


def compare(ranks: int, rate: str, steps: int) -> Row:
    """Both runs, on the same hosts' worth of network."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        entry_points(folder)
        plain_loss, plain_bytes = run("gloo", ranks, rate, steps, folder)
        coded_loss, coded_bytes = run("commlib", ranks, rate, steps, folder)
    fewer, change = plain_bytes / coded_bytes, coded_loss / plain_loss - 1
    passed = fewer >= BYTES_BAR and abs(change) <= LOSS_BAR
    figures = (plain_loss, coded_loss, plain_bytes, coded_bytes, fewer, change)
    return Row(POLICY, ranks, rate, steps, *figures, passed)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--rate", default="1gbit", help="of every host's line (default 1gbit)")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument(
        "--json", type=Path, nargs="?", const=RESULTS, help=f"append the row (to {RESULTS.name})"
    )
    args = parser.parse_args(argv)
    if args.steps < FIRST + LAST:
        parser.error(f"--steps {args.steps}: at least {FIRST + LAST}")
    reason = available()
    if reason:
        raise SystemExit(f"no hosts can be emulated here: {reason}")
    row = compare(args.ranks, args.rate, args.steps)
    print(
        f"{row.ranks} ranks, {row.rate}, {row.steps} steps, policy {row.policy}\n"
        f"loss  gloo {row.gloo_loss:.4f}  commlib {row.commlib_loss:.4f}  {row.loss_change:+.2%} "
        f"(bar {LOSS_BAR:.0%})\n"
        f"sent  gloo {row.gloo_bytes:,}  commlib {row.commlib_bytes:,}  {row.fewer:.2f}x fewer "
        f"(bar {BYTES_BAR}x)"
    )
    if args.json:
        with args.json.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(row)) + "\n")
    return 0 if row.passed else 1


if __name__ == "__main__":
    sys.exit(main())
