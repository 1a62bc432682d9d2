"""`make gpu-bench`: kernel bandwidth, launch cost, all-reduce against NCCL, DDP, a pipeline.

PYTHONPATH=.:kernels python -m bench.gpu.bench [kernels launches training pipeline all_reduce]
"""

from __future__ import annotations

import sys
import time
import traceback

import torch

from bench.gpu.all_reduce import all_reduce
from bench.gpu.kernels import bandwidth, launches
from bench.gpu.pipeline import pipeline
from bench.gpu.record import Record
from bench.gpu.training import training

PARTS = {
    "kernels": bandwidth,
    "launches": launches,
    "training": training,
    "pipeline": pipeline,
    "all_reduce": all_reduce,
}


def main() -> None:
    """Run the parts that are named, or all; one that fails does not stop the others."""
    names = sys.argv[1:] or list(PARTS)
    if unknown := set(names) - set(PARTS):
        raise SystemExit(f"unknown parts: {', '.join(unknown)}; allowed: {', '.join(PARTS)}")
    if not torch.cuda.is_available():
        raise SystemExit("torch sees no CUDA device; bench.gpu measures nothing without one")
    record, failed = Record("-".join(["bench", *sys.argv[1:]])), []
    for name in names:
        start = time.perf_counter()
        try:
            PARTS[name](record)
        except Exception:
            traceback.print_exc()
            failed.append(name)
        seconds = time.perf_counter() - start
        record.add(bench="part", part=name, seconds=seconds, ok=name not in failed)
        print(f"{name}: {seconds:.0f} s", flush=True)
    print(f"rows in {record.path}")
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
