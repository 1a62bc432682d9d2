"""Bits against error: every codec of ours and of the peers installed here, beside Shannon's bound.

    python -m bench.frontier                          tables; exit code 1 where a bar is missed
    python -m bench.frontier --plot frontier.png --json bench/results/frontier.jsonl

Peers: FBGEMM, torch and bitsandbytes as in `commlib bench codecs`; torchao and hivemind, peers.py.

Data: normal, Laplace, Student's t with 3 degrees of freedom; gradients of all matrices of the
demo's 10.9M GPT after 40 steps, and inputs of its linear layers, each a segment of one message.
Bits are those of the wire with scales, tables, padding. NMSE = |Q(x) - x|^2 / |x|^2. The gap is
``bits - 0.5 log2(1 / NMSE)``: bits above what no codec of normal data can go below.

Our frontier at a number of bits is the least error of our codecs there, between two of them on the
straight line of log NMSE over bits: what a policy reaches that gives some tensors one and some the
other. To `fp32|entropy`, which loses nothing, the straight line is one of NMSE.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from tabulate import tabulate
from torch import Tensor, nn
from tqdm import tqdm

from bench.peers import OPTIONAL, measured
from commlib.benchmark.peers import PEERS
from commlib.benchmark.rows import origin
from commlib.codecs import Codec, codec
from commlib.demo.data import load
from commlib.demo.model import GPT, SHAPES, optimizer, warm_up
from commlib_kernels import Layout, Tag

NUMEL = 1 << 20
STEPS, BATCH, CONTEXT = 40, 8, 128  # of training, before gradients and activations are taken
OURS = (
    *(f"rotate|eden{bits}" for bits in (1, 2, 3, 4)),
    *(f"eden{bits}:block=128" for bits in (1, 2, 3, 4)),
    *(f"rotate|int{bits}:block=1024" for bits in range(2, 9)),
    *(f"int{bits}" for bits in range(2, 9)),
    *("int4:block=32", "int8:block=32", "nf4", "rotate|nf4:block=1024"),
    *("mxfp8", "mxfp4", "e2m1", "e2m1:block=32", "rotate|mxfp4:block=1024"),
    *(f"rotate|grid{bits}|entropy" for bits in range(2, 7)),
    *("int4|entropy", "rotate|int4:block=1024|entropy", "rotate|eden4|entropy"),
    *("sign", "ternary", "fp8", "fp8:block=32", "natural", "qsgd", "bf16", "fp16"),
    *("fp16|entropy", "fp32|entropy"),
)
# Bits above the bound that each may have on normal data, and how many more on any other.
GAPS = {"rotate|eden4": 0.70, "rotate|eden2": 0.50, "rotate|eden1": 0.32}
GAPS |= {f"rotate|grid{bits}|entropy": 0.30 for bits in range(2, 7)}
ELSEWHERE = 0.05
ANY = ("laplace", "student t(3)", "gradients")


@dataclass(frozen=True)
class Row:
    """One codec on one kind of data."""

    data: str
    codec: str
    peer: bool
    bits: float
    nmse: float
    gap: float | None  # None where nothing is lost, or more than all
    numel: int
    device: str = field(default_factory=lambda: origin().device)
    versions: dict[str, str] = field(default_factory=lambda: origin().versions)
    commit: str | None = field(default_factory=lambda: origin().commit)


def samples(numel: int = NUMEL) -> dict[str, list[Tensor]]:
    """Data by name: flat fp32 segments."""
    g = torch.Generator().manual_seed(0)
    normal = torch.randn(numel, generator=g)
    signs = torch.randn(numel, generator=g).sign()
    laplace = torch.empty(numel).exponential_(generator=g) * signs
    chi = torch.randn(3, numel, generator=g).square().sum(0) / 3
    student = torch.randn(numel, generator=g) / chi.sqrt()
    gradients, activations = captured()
    return {
        "normal": [normal],
        "laplace": [laplace],
        "student t(3)": [student],
        "gradients": gradients,
        "activations": activations,
    }


def captured(shape: str = "10M", steps: int = STEPS) -> tuple[list[Tensor], list[Tensor]]:
    """Gradients of all matrices of the GPT, and inputs of its linear layers, after `steps`."""
    corpus, model = load(), GPT(SHAPES[shape])
    adam = optimizer("adamw", model)
    inputs: list[Tensor] = []

    def keep(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        inputs.append(args[0].detach().flatten().clone())

    for step in range(steps + 1):
        if step == steps:
            for module in model.modules():
                if isinstance(module, nn.Linear):
                    module.register_forward_pre_hook(keep)
        adam.zero_grad()
        model(*corpus.batch(BATCH, CONTEXT, seed=0, step=step, rank=0)).backward()
        if step < steps:
            warm_up(adam, step)
            adam.step()
    matrices = [p.grad.flatten() for p in model.parameters() if p.ndim > 1 and p.grad is not None]
    return matrices, inputs


def measure(name: str, segments: Sequence[Tensor]) -> Iterator[Row]:
    """Rows of all codecs on one message; peers that are missing or fail on it are left out."""
    sizes, x = tuple(s.numel() for s in segments), torch.cat(list(segments))

    def row(label: str, peer: bool, nbytes: float, decoded: Tensor) -> Row:
        error = decoded.double().flatten() - x.double()
        nmse = float(error @ error) / float(x.double() @ x.double())
        bits = 8 * nbytes / x.numel()
        gap = bits - 0.5 * math.log2(1 / nmse) if 0 < nmse < 1 else None
        return Row(name, label, peer, bits, nmse, gap, x.numel())

    for text in OURS:
        c = codec(text)
        layout = Layout(sizes, align=c.align)
        yield row(text, False, *_round_trip(c, x, layout))
    for label, make in PEERS.items():
        if label == "torch.compile int8":
            continue  # the eager one's numbers, faster
        try:
            peer = make(x)
            yield row(label, True, peer.nbytes, peer.decoded())
        except Exception as error:
            tqdm.write(f"{label}: left out, {error}", file=sys.stderr)
    for label in OPTIONAL:
        try:
            yield row(label, True, *measured(label, segments))
        except Exception as error:
            tqdm.write(f"{label} on {name}: left out, {error}", file=sys.stderr)


def _round_trip(c: Codec, x: Tensor, layout: Layout) -> tuple[int, Tensor]:
    """Bytes that travel, and what they decode to."""
    c = c.rounded("nearest")
    wire = torch.empty(c.nbytes(layout), dtype=torch.uint8)
    out = torch.empty_like(x)
    used = c.encode(x, wire, layout, Tag())
    c.decode(wire, out, layout, Tag())
    return used, out


def frontier(rows: Sequence[Row], bits: float) -> float:
    """The least NMSE of `rows` at `bits`, between two on a straight line (see above)."""
    points = sorted((r.bits, math.log2(r.nmse)) for r in rows if 0 < r.nmse < 1)
    below = [p for p in points if p[0] <= bits]
    above = [p for p in points if p[0] > bits]
    best = min((error for _, error in below), default=math.inf)
    for b0, e0 in below:
        for b1, e1 in above:
            best = min(best, e0 + (e1 - e0) * (bits - b0) / (b1 - b0))
    whole = min((r.bits for r in rows if r.nmse == 0), default=math.inf)
    if bits >= whole:
        return 0.0
    shared = (2.0**e0 * (whole - bits) / (whole - b0) for b0, e0 in below if whole < math.inf)
    return min([2.0**best, *shared])


def verdicts(rows: Sequence[Row]) -> list[tuple[str, str, bool]]:
    """Every bar: what, the figure, whether it holds."""
    found = []
    by = {(r.data, r.codec): r for r in rows}
    for text, limit in GAPS.items():
        normal = by["normal", text].gap or math.inf
        found.append((f"{text}: gap on normal data <= {limit}", f"{normal:.3f}", normal <= limit))
        for data in ANY:
            more = (by[data, text].gap or math.inf) - normal
            what = f"{text}: {data} at most {ELSEWHERE} above that"
            found.append((what, f"{more:+.3f}", more <= ELSEWHERE))
    for peer in (r for r in rows if r.peer):
        mine = frontier([r for r in rows if r.data == peer.data and not r.peer], peer.bits)
        what = f"{peer.codec} on {peer.data}: ours at {peer.bits:.3f} bits no worse"
        equal = 1 + 1e-12  # the frontier goes through logarithms
        found.append((what, f"{mine / peer.nmse:.3f} of its NMSE", mine <= peer.nmse * equal))
    return found


def draw(rows: Sequence[Row], file: Path) -> None:
    """One panel per kind of data, and one for the legend."""
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise RuntimeError("--plot needs matplotlib: pip install '.[plot]'") from error
    names = list(dict.fromkeys(r.data for r in rows))
    figure, axes = pyplot.subplots(2, 3, figsize=(13, 8), sharex=True, sharey=True)
    libraries = list(dict.fromkeys(r.codec.split()[0] for r in rows if r.peer))
    markers = dict(zip(libraries, "xsd^v", strict=False))
    kinds: dict[str, Callable[[str], bool]] = {
        "commlib rotate|eden": lambda t: t.startswith("rotate|eden") and "entropy" not in t,
        "commlib rotate|grid|entropy": lambda t: t.startswith("rotate|grid"),
        "commlib rotate|int": lambda t: t.startswith("rotate|int") and "entropy" not in t,
        "commlib int": lambda t: t.startswith("int") and not set(":|") & set(t),
    }
    for axis, name in zip(axes.flat, names, strict=False):
        here = [r for r in rows if r.data == name and 0 < r.nmse < 1 and r.bits < 10]
        grid = [1 + 0.05 * i for i in range(160)]
        axis.plot(grid, [2 ** (-2 * b) for b in grid], "k:", label="Shannon's bound, normal data")
        for label, is_kind in kinds.items():
            points = sorted((r.bits, r.nmse) for r in here if is_kind(r.codec) and not r.peer)
            axis.plot(*zip(*points, strict=True), "o-", ms=4, label=label)
        for library, marker in markers.items():
            theirs = [(r.bits, r.nmse) for r in here if r.peer and r.codec.split()[0] == library]
            if theirs:
                axis.plot(*zip(*theirs, strict=True), marker, color="black", ms=5, label=library)
        axis.set(title=name, yscale="log", ylim=(1e-6, 2))
        axis.xaxis.set_tick_params(labelbottom=True)
    for axis in axes[:, 0]:
        axis.set_ylabel("NMSE")
    for axis in axes[1]:
        axis.set_xlabel("bits per element")
    handles, labels = axes.flat[0].get_legend_handles_labels()
    axes.flat[-1].axis("off")
    axes.flat[-1].legend(handles, labels, loc="center", frameon=False)
    figure.tight_layout()
    figure.savefig(file, dpi=110)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, help="write one row per codec and kind of data")
    parser.add_argument("--plot", type=Path, help="draw it into a PNG")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    rows: list[Row] = []
    for name, segments in tqdm(samples().items(), desc="data", disable=None):
        rows += measure(name, segments)
    names = list(dict.fromkeys(r.data for r in rows))
    by = {(r.data, r.codec): r for r in rows}
    labels = sorted({r.codec for r in rows}, key=lambda label: by["normal", label].bits)
    body = [
        [
            label,
            by["normal", label].bits,
            *(by[n, label].gap if (n, label) in by else None for n in names),
        ]
        for label in labels
    ]
    print(tabulate(body, ["gap in bits", "bits", *names], floatfmt=".3f"))
    found = verdicts(rows)
    print(tabulate([[what, figure, "" if ok else "MISSED"] for what, figure, ok in found]))
    print(f"{sum(ok for *_, ok in found)} of {len(found)} bars hold")
    if args.json:
        args.json.write_text("".join(json.dumps(asdict(row)) + "\n" for row in rows))
    if args.plot:
        draw(rows, args.plot)
    return 0 if all(ok for *_, ok in found) else 1


if __name__ == "__main__":
    sys.exit(main())
