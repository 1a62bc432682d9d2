"""What `commlib bench` and `commlib warmup` do once their arguments are read."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from commlib_kernels.numba_cpu.jit import cache_dir

from .. import emulation
from .codecs import OPERATIONS, CodecBench
from .codecs import run as run_codecs
from .codecs import warmup as warmup_steps
from .collectives import Bench, process_group, sizes_between
from .collectives import run as run_collectives
from .rows import CodecRow, Row, codec_table, origin, table, versions, write_jsonl

SPAWN_SECONDS = 24 * 3600.0  # the ranks have timeouts of their own; this one only ends the absurd


def collective(args: argparse.Namespace) -> int:
    """Measure on the ranks of this job, or start ranks that do."""
    if args.device == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("--device cuda: torch sees no CUDA device")
    if args.device == "cuda" and "RANK" not in os.environ:
        raise RuntimeError(
            "--device cuda measures the ranks of a job: start one rank per GPU, with "
            "`torchrun --nproc-per-node N -m commlib.cli -- bench ... --device cuda`"
        )
    if "RANK" not in os.environ:
        return _start_ranks(args)
    if args.hosts:
        raise RuntimeError("--hosts is for ranks that are started here; a job's have their hosts")
    bench = Bench(
        op=args.op,
        schemes=args.schemes,
        sizes=sizes_between(args.min, args.max, args.factor),
        rate=emulation.parse_rate(args.rate) if args.rate else None,
        link=args.link or ("joined" + (f", {args.rate}" if args.rate else "")),
        iters=args.iters,
        budget=args.budget,
        timeout=args.timeout,
        seed=args.seed,
        device=args.device,
    )
    _join_ranks(bench, args.json)
    return 0


def _start_ranks(args: argparse.Namespace) -> int:
    """This command again, once per rank; what is decided here is passed on."""
    reason = emulation.available() if args.hosts else None
    if reason is not None:
        raise RuntimeError(f"--hosts {args.hosts}: cannot emulate hosts here ({reason})")
    rate = emulation.rate_here(args.rate)
    hosts = args.hosts or (args.ranks if rate else None)
    link = args.link or (f"{hosts} emulated hosts, {rate or 'no limit'}" if hosts else "loopback")
    if args.link and args.rate and not rate:  # it is not what the user named
        link += ", loopback"
    words = ["bench", args.op, "--schemes", ",".join(args.schemes), "--link", link]
    for name in ("min", "max", "factor", "budget", "timeout", "seed"):
        words += [f"--{name}", str(getattr(args, name))]
    if rate:
        words += ["--rate", rate]
    if args.iters:
        words += ["--iters", str(args.iters)]
    if args.json:
        words += ["--json", str(args.json.resolve())]
    argv = [sys.executable, "-m", "commlib.cli", *words]
    # c10d warns that emulated hosts have no names; errors still come through
    env = {"TORCH_CPP_LOG_LEVEL": os.environ.get("TORCH_CPP_LOG_LEVEL", "ERROR")}
    return emulation.spawn(argv, args.ranks, hosts=hosts, rate=rate, env=env, timeout=SPAWN_SECONDS)


def _join_ranks(bench: Bench, json_file: Path | None) -> None:
    first = os.environ["RANK"] == "0"
    if first:
        world, about = os.environ["WORLD_SIZE"], origin()
        print(f"# {bench.op}, {world} ranks, {bench.link}; {about.device}")
        print(f"# {versions()}", flush=True)
        if json_file is not None:
            json_file.unlink(missing_ok=True)

    def show(rows: list[Row]) -> None:
        print(f"\n{table(rows)}\n{rows[0].iters} rounds", flush=True)
        if json_file is not None:
            write_jsonl(json_file, rows)

    with process_group(bench.timeout, bench.device):
        run_collectives(bench, show, progress=first)


def codecs(args: argparse.Namespace) -> int:
    """Measure codecs on this machine and print the table."""
    if args.json is not None:
        args.json.unlink(missing_ok=True)
    skipped: list[str] = []
    with tqdm(desc="codecs", unit=" codec", disable=None, leave=False) as bar:

        def show(rows: list[CodecRow]) -> None:
            bar.update()
            if args.json is not None:
                write_jsonl(args.json, rows)

        rows = run_codecs(
            CodecBench(
                codecs=args.codecs,
                size=args.size,
                threads=args.threads,
                iters=args.iters,
                budget=args.budget,
                peers=not args.no_peers,
                seed=args.seed,
            ),
            on_rows=show,
            on_skip=lambda name, reason: skipped.append(f"not measured: {name} ({reason})"),
        )
    copy = max(row.input_GBps for row in rows if row.op == "copy")
    print(f"# codecs, {args.threads} thread; {origin().device}; copy {copy:.1f} GB/s of input")
    print(f"# {versions()}")
    print(codec_table(rows, OPERATIONS))
    print(*skipped, sep="\n")
    return 0


def warmup(codecs: Sequence[str]) -> int:
    """Compile every kernel, with a progress bar, and say where the cache is."""
    start = time.perf_counter()
    steps = warmup_steps(codecs)
    with tqdm(steps, desc="warmup", unit=" step", disable=None, leave=False) as bar:
        for step in bar:
            bar.set_postfix_str(step.__name__)
            step()
    print(f"{len(steps)} steps in {time.perf_counter() - start:.1f} s; the cache is {cache_dir()}")
    return 0
