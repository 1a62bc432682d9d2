"""The `commlib` command: bench, demo, plan, warmup, doctor.

Exit codes: 0 done, 1 a fault was found or a run failed, 2 wrong arguments, 130 Ctrl-C.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from pathlib import Path

T = TypeVar("T")

COLLECTIVES = ("all_reduce", "reduce_scatter", "all_gather")
PAIRS = "send_recv"

_ABOUT = """\
Distributed training in PyTorch that talks less.

  commlib doctor                          is this machine ready, and at what speed does commlib pay?
  commlib bench all_reduce --rate 1gbit   compressed collectives against the library's own
  commlib bench send_recv --rate 1gbit    compressed messages between pairs of ranks
  commlib bench codecs                    codecs on one core against a plain copy
  commlib demo                            train a small GPT on an emulated slow network
  commlib demo --pipeline                 the same in pipeline stages: activations compressed
  commlib plan --rate 1gbit               a scheme for every layer, by measured gradients
  commlib warmup                          compile all kernels now instead of at the first step
"""
_BENCH = """\
Collectives side by side: each round times every contestant once, in a fixed order; a time is the
slowest rank's from a barrier. The first rows are the library's own collective in fp32 and bf16, a
no-op (a barrier) and the bare link (all_to_all_single of uint8).

With RANK set (torchrun, srun) it joins that job; otherwise it starts its own ranks, each on an
emulated host where --rate is given, or several on each of --hosts.

  size, sent   bytes of the whole fp32 tensor; bytes one rank sends (KiB, MiB: powers of 1024)
  algbw        size / time; busbw = algbw x what fp32 must send / size; GB/s = 1e9 bytes/s
  rel err      |result - exact| / |exact| of the first message (fp64, sampled over all ranks)
  speed-up     p50 of the library's fp32 collective / p50
  time ratio   median of the ratios to the library's fp32 in the same round, 95% interval where
               there are 6 rounds or more
  wire eff     bytes sent / line rate / p50
  host sent    where ranks share hosts: bytes that leave the busiest one, headers and all, as its
               interface counts them (gloo, on one known interface); then only these are what
               `wire eff` is of

examples:
  commlib bench all_reduce --schemes fp32,bf16,int8+ef,int4+ef --min 64KiB --max 64MiB \\
      --ranks 4 --rate 1gbit --json rows.jsonl
  commlib bench all_reduce --schemes auto --min 4KiB --max 16MiB --rate 100mbit
  commlib bench all_reduce --schemes int4+ef,int4+ef@hierarchical --ranks 4 --hosts 2 --rate 1gbit
  torchrun --nnodes 2 --nproc-per-node 1 ... -m commlib.cli -- bench all_reduce --rate 10gbit
"""
_PAIRS = """\
Pairs of ranks, 0 to 1, 2 to 3 and so on (the last of an odd number is idle), one way: from a
barrier until the receiver has decoded the tensor and the sender has heard of it. The first rows are
torch's own send and recv in fp32 and bf16 and a no-op (a barrier); then commlib.distributed's under
each scheme. Messages have no memory: schemes without feedback.

Columns, ranks and hosts are those of `commlib bench all_reduce`; size is that of one fp32 message,
and busbw is algbw.

examples:
  commlib bench send_recv --schemes bf16,int8,int4 --min 64KiB --max 64MiB --ranks 2 --rate 1gbit
  torchrun --nnodes 2 --nproc-per-node 1 ... -m commlib.cli -- bench send_recv --rate 10gbit
"""
_CODECS = """\
Every operation of every codec on one core: GB/s of fp32 input and, in brackets, the fraction of
this run's copy into a ready buffer. bits: per element; NMSE: on Gaussian data; R-D gap: bits above
the rate-distortion bound. Ends with FBGEMM, torch and bitsandbytes where they are installed.

examples:
  commlib bench codecs
  commlib bench codecs --codecs int8,int4:block=64,sign --size 16MiB --json codecs.jsonl
"""

_WARMUP = """\
Compiles every kernel for every codec, rounding and dtype, so that no training step waits for it.
Run it once per machine (or once on a cache folder that the machines share).
"""
_DOCTOR = """\
Checks versions, backends, devices, environment, kernel cache and gloo's interface; measures what
two ranks reach on this host (or, started by torchrun, on the real link) and prints from which size
on compression pays there. Every line is OK, WARN or FAULT with what to do; exit 1 on a FAULT.
"""


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    top = argparse.ArgumentParser(
        prog="commlib", description=_ABOUT, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    top.add_argument("--version", action="store_true", help="print versions and exit")
    commands = top.add_subparsers(dest="command", metavar="COMMAND")

    bench = commands.add_parser(
        "bench", help="measure collectives (default: all_reduce), send_recv, codecs"
    )
    ops = bench.add_subparsers(dest="op", metavar="OP", required=True)
    for name in COLLECTIVES:
        _collective_options(_command(ops, name, f"{name} side by side", _BENCH))
    _collective_options(
        _command(ops, PAIRS, "messages between pairs of ranks", _PAIRS),
        schemes=("fp32", "bf16", "int8", "int4"),
        ranks=2,
    )
    _codec_options(_command(ops, "codecs", "codecs on one core", _CODECS))

    # have their own options and their own --help; main() hands the words over before parsing
    commands.add_parser("demo", help="train a small GPT on an emulated network", add_help=False)
    commands.add_parser("plan", help="a scheme for every layer of a model", add_help=False)
    warmup = _command(commands, "warmup", "compile all kernels into the cache", _WARMUP)
    warmup.add_argument(
        "--codecs", type=_each(_codec), default=(), metavar="LIST", help="only these (default: all)"
    )
    doctor = _command(commands, "doctor", "check this machine and its link", _DOCTOR)
    doctor.add_argument("--json", action="store_true", help="one JSON object instead of text")
    doctor.add_argument("--no-probe", action="store_true", help="do not measure: seconds less")
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code; argparse exits with 2 by itself."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words == ["bench"] or (words[:1] == ["bench"] and _is_option(words[1])):
        words.insert(1, COLLECTIVES[0])
    if words[:1] == ["demo"]:
        return _guarded(lambda: _demo(words[1:]))
    if words[:1] == ["plan"]:
        return _guarded(lambda: _plan(words[1:]))
    top = parser()
    args = top.parse_args(words)
    if args.version:
        from .benchmark.rows import versions

        print(versions())
        return 0
    if args.command is None:
        top.print_help()
        return 2
    if args.command == "bench" and (refusal := _unfit(args)):
        top.error(refusal)
    run = {"warmup": _warmup, "doctor": _doctor, "bench": _collective}[args.command]
    if args.command == "bench" and args.op == "codecs":
        run = _codecs
    return _guarded(lambda: run(args))


def _unfit(args: argparse.Namespace) -> str:
    """Why options of `bench`, each of them right, do not fit together; empty where they do."""
    if args.op == "codecs":
        return f"--size {args.size}: at least 4, one value" if args.size < 4 else ""
    if args.min > args.max:
        return f"--min {args.min} is larger than --max {args.max} (bytes)"
    if args.min < 1 or args.factor < 2:
        return f"--min {args.min} --factor {args.factor}: --min is at least 1, --factor 2"
    if (args.hosts or 0) > args.ranks:
        return f"--hosts {args.hosts} is more than --ranks {args.ranks}: every host runs a rank"
    if args.op != PAIRS:
        return _no_memory(args.op, args.schemes)
    with_memory = [scheme for scheme in args.schemes if "+" in scheme]
    if with_memory:
        return f"--schemes {','.join(with_memory)}: messages have no memory; cut them at the +"
    if args.ranks < 2:
        return "--ranks 1: send_recv takes pairs of ranks, at least 2"
    return ""


def _no_memory(op: str, schemes: Sequence[str]) -> str:
    """Which scheme remembers what no message of this collective has."""
    from .planning import check_memory
    from .policy import Scheme

    for text in schemes:
        try:
            if text != "auto":
                check_memory(op, Scheme.parse(text))
        except ValueError as error:
            return f"--schemes {error}"
    return ""


def _is_option(word: str) -> bool:
    return word.startswith("-") and word not in ("-h", "--help")


def _guarded(run: Callable[[], int]) -> int:
    """What the world refuses as one line and exit 1; a rank keeps its traceback."""
    try:
        return run()
    except RuntimeError as error:
        if "RANK" in os.environ:
            raise
        print(f"commlib: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `commlib bench | head`: nobody is left to read a traceback
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


# ---------------------------------------------------------------- options


def _collective_options(
    sub: argparse.ArgumentParser,
    schemes: tuple[str, ...] = ("fp32", "bf16", "int8+ef", "int4+ef"),
    ranks: int = 4,
) -> None:
    add = functools.partial(_option, sub)
    add("--schemes", _each(_scheme), schemes, "LIST", "scheme texts or auto, comma-separated")
    add("--min", _size, 64 << 10, "SIZE", "smallest size of the fp32 tensor", shown="64KiB")
    add("--max", _size, 64 << 20, "SIZE", "largest size", shown="64MiB")
    add("--factor", _positive, 4, "N", "from one size to the next")
    add("--ranks", _positive, ranks, "N", "ranks to start")
    add("--hosts", _positive, None, "N", "emulated hosts for them", shown="one for each, or none")
    rate = "line rate of every host, such as 200mbit; where ranks are joined only for `wire eff`"
    add("--rate", _rate, None, "RATE", rate, shown="no limit")
    add("--iters", _positive, None, "N", "rounds per size", shown="what --budget fits")
    add("--budget", _above_zero, 20.0, "SECONDS", "for the rounds of a size")
    add("--timeout", _above_zero, 300.0, "SECONDS", "of one collective")
    add("--seed", int, 0, "N", "of the data and of random rounding")
    sub.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        default="cpu",
        help="cuda: NCCL instead of gloo; under torchrun, a rank per GPU (default: cpu)",
    )
    add("--json", _output, None, "FILE", "one JSON row per line, replaces FILE", shown="none")
    add("--link", str, None, "TEXT", "name of the link in the rows", shown="what was started")


def _codec_options(sub: argparse.ArgumentParser) -> None:
    add = functools.partial(_option, sub)
    add("--codecs", _each(_codec), (), "LIST", "codec texts, comma-separated", shown="all")
    add("--size", _size, 64 << 20, "SIZE", "of the fp32 input", shown="64MiB")
    add("--threads", _positive, 1, "N", "of torch")
    add("--iters", _positive, None, "N", "rounds per codec", shown="what --budget fits")
    add("--budget", _above_zero, 5.0, "SECONDS", "for the rounds of a codec")
    add("--seed", int, 0, "N", "of the data")
    add("--json", _output, None, "FILE", "one JSON row per line, replaces FILE", shown="none")
    sub.add_argument("--no-peers", action="store_true", help="without FBGEMM, torch, bitsandbytes")


def _option(
    sub: argparse.ArgumentParser,
    name: str,
    parse: Callable[[str], object],
    default: object,
    metavar: str,
    text: str,
    shown: str | None = None,
) -> None:
    """One option whose help ends with its default, as a person would write it."""
    if shown is None:
        shown = ",".join(default) if isinstance(default, tuple) else f"{default:g}"
    text = f"{text} (default: {shown})"
    sub.add_argument(name, type=parse, default=default, metavar=metavar, help=text)


# ---------------------------------------------------------------- commands


def _collective(args: argparse.Namespace) -> int:
    from .benchmark.command import collective

    return collective(args)


def _codecs(args: argparse.Namespace) -> int:
    from .benchmark.command import codecs

    return codecs(args)


def _warmup(args: argparse.Namespace) -> int:
    from .benchmark.command import warmup

    return warmup(args.codecs)


def _doctor(args: argparse.Namespace) -> int:
    from .doctor import run

    return run(probe=not args.no_probe, as_json=args.json)


def _demo(words: list[str]) -> int:
    from .demo import main as demo

    return demo(words)


def _plan(words: list[str]) -> int:
    from .demo.plan import main as plan

    return plan(words)


# ---------------------------------------------------------------- arguments


def _command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], name: str, text: str, about: str
) -> argparse.ArgumentParser:
    return commands.add_parser(
        name,
        help=text,
        description=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def _checked(parse: Callable[[str], T]) -> Callable[[str], T]:
    """argparse shows the text of an ArgumentTypeError, and only of that."""

    def typed(text: str) -> T:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return typed


def _each(parse: Callable[[str], str]) -> Callable[[str], tuple[str, ...]]:
    def each(text: str) -> tuple[str, ...]:
        from .demo.words import words

        return tuple(map(parse, words(text)))

    return each


@_checked
def _size(text: str) -> int:
    from .benchmark.units import parse_size

    return parse_size(text)


@_checked
def _output(text: str) -> Path:
    from .benchmark.units import parse_output

    return parse_output(text)


@_checked
def _rate(text: str) -> str:
    from .emulation import parse_rate

    parse_rate(text)
    return text


def _positive(text: str) -> int:
    from .demo.words import positive

    return positive(text)


def _above_zero(text: str) -> float:
    from .demo.words import above_zero

    return above_zero(text)


@_checked
def _scheme(text: str) -> str:
    from .policy import Scheme

    return text if text == "auto" else str(Scheme.parse(text))


@_checked
def _codec(text: str) -> str:
    from .codecs import codec

    return str(codec(text))


if __name__ == "__main__":
    sys.exit(main())
