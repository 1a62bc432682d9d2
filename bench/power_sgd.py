"""PowerSGD beside PyTorch's own hook: held-out loss at equal steps, and the bytes for it.

    python -m bench.power_sgd                 4 ranks on loopback, the small GPT, about a minute
    python -m bench.power_sgd --steps 200 --json

Every method is a DDP model of its own in the same processes; they take turns step by step, on the
same batches from the same weights. Both kinds begin after START steps: by then DDP has regrouped
its buckets, by which PyTorch's hook knows what it remembers. PyTorch's hook is waited for before it
returns: with more than one bucket on gloo its exchanges, issued from callbacks, get out of order.

Bytes are payloads that a rank sent from step START on, by the transport's count; of PyTorch's
hook, which sends all-reduces of fp32 alone, 2 (W-1)/W of the numbers that it says it compressed
to. Milliseconds are medians of a step, with ranks that share this machine's cores.

No `from __future__ import annotations` here: DDP compares the hook's annotations with the classes.
"""

import argparse
import os
import shlex
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from tabulate import tabulate
from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook as theirs
from torch.nn.parallel import DistributedDataParallel as DDP

import commlib
from bench.feedback import write
from commlib.demo.data import Corpus, load
from commlib.demo.model import GPT, OPTIMIZERS, SHAPES, optimizer, warm_up
from commlib.demo.train import gather
from commlib.emulation import spawn
from commlib.policy import Policy, Rule, Scheme

RESULTS = Path(__file__).parent / "results" / "power_sgd.jsonl"
RANKS = (1, 2, 4)  # of the matrices
START = 2
PLAIN, TORCH = "plain DDP", "torch rank "
METHODS = (
    PLAIN,
    *(f"{TORCH}{rank}" for rank in RANKS),
    *(f"fp32+ef@power_sgd:rank={rank}" for rank in RANKS),
    "fp16+ef@power_sgd:rank=4",
)


@dataclass(frozen=True)
class Row:
    """One method. loss: held-out, mean of the seeds; ratios are to plain DDP's."""

    method: str
    loss: float
    to_plain: float
    bytes_per_step: float
    fewer: float
    ms: float
    setting: dict[str, object] = field(default_factory=dict)


class Trainee:
    """A model in training by one method."""

    def __init__(self, method: str, args: argparse.Namespace, seed: int) -> None:
        module = GPT(SHAPES[args.model], seed=seed)
        self.method, self.args, self.seed = method, args, seed
        self.model = DDP(module, bucket_cap_mb=args.bucket_mb)
        self.optimizer = optimizer(args.optimizer, module)
        self.state: theirs.PowerSGDState | None = None
        self.ms: list[float] = []
        self.begun = 0
        if method.startswith(TORCH):
            self.state = theirs.PowerSGDState(
                dist.group.WORLD,
                matrix_approximation_rank=int(method.removeprefix(TORCH)),
                start_powerSGD_iter=START,
            )
            self.model.register_comm_hook(self.state, waited)
        elif method != PLAIN:
            # as torch's: what has two dimensions, if it gets smaller by half
            rule = Rule(Scheme.parse(method), min_ndim=2, from_step=START)
            commlib.wrap(self.model, Policy((rule,)), seed=seed)

    def step(self, corpus: Corpus, step: int) -> None:
        args, rank = self.args, dist.get_rank()
        warm_up(self.optimizer, step)
        x, y = corpus.batch(args.batch, args.context, seed=self.seed, step=step, rank=rank)
        if step == START:
            self.begun = self.sent()
        dist.barrier()
        start = time.perf_counter()
        self.model(x, y).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ms.append(1e3 * (time.perf_counter() - start))

    def sent(self) -> int:
        """Payload bytes that this rank has sent."""
        ring = 2 * (dist.get_world_size() - 1) / dist.get_world_size()
        if self.method == PLAIN:
            numel = sum(p.numel() for p in self.model.parameters())
            return int(ring * 4 * numel * len(self.ms))
        if self.state is not None:
            return int(ring * 4 * self.state.total_numel_after_compression)
        return commlib.of(self.model).bytes_sent()

    @torch.no_grad()
    def loss(self, pair: tuple[torch.Tensor, torch.Tensor]) -> float:
        return float(gather([float(self.model.module(*pair))]).mean())


def waited(
    state: theirs.PowerSGDState,
    bucket: dist.GradBucket,  # type: ignore[name-defined]  # missing from the stubs
) -> torch.futures.Future[torch.Tensor]:
    """PyTorch's hook; no other bucket's exchanges are issued before all of this one's."""
    future = theirs.powerSGD_hook(state, bucket)
    future.wait()
    return future


def train(args: argparse.Namespace) -> list[Row]:
    """All methods and seeds on this rank."""
    torch.set_num_threads(1)
    corpus, rank, ranks = load(), dist.get_rank(), dist.get_world_size()
    losses: dict[str, list[float]] = {}
    sent: dict[str, float] = {}
    ms: dict[str, list[float]] = {}
    for seed in range(args.seeds):
        trainees = [Trainee(method, args, seed) for method in args.methods]
        for step in range(args.steps):
            shift = step % len(trainees)
            for one in trainees[shift:] + trainees[:shift]:
                one.step(corpus, step)
            if rank == 0 and sys.stderr.isatty():
                print(f"\rseed {seed}, step {step + 1}", end="", file=sys.stderr)
        pair = corpus.evaluation(args.evaluate, args.context, rank=rank, ranks=ranks)
        for one in trainees:
            losses.setdefault(one.method, []).append(one.loss(pair))
            sent[one.method] = (one.sent() - one.begun) / (args.steps - START)
            ms.setdefault(one.method, []).extend(one.ms[START:])
    base = statistics.fmean(losses[PLAIN])
    setting = {name: getattr(args, name) for name in ("model", "optimizer", "steps", "seeds")}
    setting |= {"ranks": ranks, "batch": args.batch, "bucket_mb": args.bucket_mb}
    return [
        Row(
            method,
            statistics.fmean(losses[method]),
            statistics.fmean(losses[method]) / base,
            sent[method],
            sent[PLAIN] / sent[method],
            statistics.median(ms[method]),
            {**setting, "losses": losses[method]},
        )
        for method in args.methods
    ]


def table(rows: Sequence[Row]) -> str:
    body = [
        [
            row.method,
            f"{row.loss:.4f}",
            f"{100 * (row.to_plain - 1):+.2f}%",
            f"{row.bytes_per_step / 1e3:.1f}",
            f"{row.fewer:.1f}x",
            f"{row.ms:.0f}",
        ]
        for row in rows
    ]
    header = ["method", "held-out loss", "to plain", "kB sent/step", "fewer", "ms/step"]
    return tabulate(body, header, disable_numparse=True, stralign="right")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", default=METHODS, help="plain DDP is always there")
    parser.add_argument("--ranks", type=int, default=4, help="processes (default 4)")
    parser.add_argument("--model", choices=SHAPES, default="small")
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="adamw")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--batch", type=int, default=2, help="windows per rank and step")
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--evaluate", type=int, default=16, help="held-out windows per rank")
    parser.add_argument("--bucket-mb", type=float, default=1.0)
    parser.add_argument(
        "--json", type=Path, nargs="?", const=RESULTS, help=f"append rows (to {RESULTS.name})"
    )
    given = list(sys.argv[1:] if argv is None else argv)
    args = parser.parse_args(given)
    args.methods = tuple(dict.fromkeys((PLAIN, *args.methods)))
    if args.steps <= START or args.seeds < 1:
        parser.error(f"--steps must be above {START}, --seeds at least 1")
    if "RANK" not in os.environ:
        command = [sys.executable, "-m", "bench.power_sgd", *given]
        return spawn(command, args.ranks, timeout=3600)
    dist.init_process_group("gloo")
    try:
        rows = train(args)
        dist.barrier()
    finally:
        dist.destroy_process_group()
    if os.environ["RANK"] == "0":
        print(f"\n{args.ranks} ranks, {args.model} GPT, {args.optimizer}, {args.steps} steps\n")
        print(table(rows))
        if args.json:
            command = shlex.join(["python", "-m", "bench.power_sgd", *given])
            write(args.json, rows, command, "power_sgd")  # type: ignore[arg-type]
    return 0


if __name__ == "__main__":
    sys.exit(main())
