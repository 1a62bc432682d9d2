"""What the traffic cost: raw and wire bytes, seconds and error per (op, key, scheme).

    ratio   = raw bytes / wire bytes         wire: what this rank sent, as its transport counted it
    rel_err = |Q(v) - v| / |v|               L2, sampled: one message in `sample_every` per key
    seconds                                  from a message's first step to its last

On CUDA seconds are the device's own, from where its stream reaches a message to where it leaves it,
other ranks' delays included. Nobody waits for them: a message is counted once the device is done
with it, as an error is. What a CUDA graph replays is not counted.

Warnings go through the logger "commlib". An error is remarkable when it is far above what the same
scheme does to Gaussian data: then a few outliers own the blocks of that tensor, and it is better
kept exact. What was asked to be compressed and was not is said once per reason, on rank 0.
"""

from __future__ import annotations

import functools
import json
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch
from tabulate import tabulate

from commlib_kernels import reference
from commlib_kernels.layout import Layout, nbytes
from commlib_kernels.tag import Tag

from .algorithms import PowerSGD, Thc
from .collectives import thc
from .scheme import Scheme

logger = logging.getLogger("commlib")

# An error is remarkable from this many times the error on Gaussian data. In blocks of 128, int4 and
# int8 make 1.3 times that on Laplace data, 1.8 and 2.1 on Student-t data (3 degrees of freedom),
# and 2.7 and 3.5 where every block has one value of 30 sigma.
REMARKABLE = 2.5


@functools.lru_cache(maxsize=256)
def typical_error(scheme: str) -> float:
    """Relative L2 error that `scheme`'s codec makes on 4096 Gaussian numbers, by running it.

    By the reference: it makes the same bytes, and has nothing to compile for a device that the
    training does not use.
    """
    parsed = Scheme.parse(scheme)
    codec = parsed.codec
    if isinstance(parsed.algorithm, PowerSGD):
        return 1.0  # of a large matrix without structure low rank has next to nothing
    x = torch.randn(4096, generator=torch.Generator().manual_seed(0))
    if isinstance(parsed.algorithm, Thc):
        return float((thc.approximated(x, parsed.algorithm.bits) - x).norm() / x.norm())
    layout = Layout(sizes=(x.numel(),))
    wire = torch.zeros(nbytes(layout, codec.format), dtype=torch.uint8)
    out = torch.empty_like(x)
    reference.quantize(codec.format, x, wire, layout, Tag())
    reference.dequantize(codec.format, wire, out, layout)
    return float((out - x).norm() / x.norm())


@dataclass
class _Sum:
    """Running totals of one (op, key, scheme)."""

    calls: int = 0
    raw_bytes: int = 0
    wire_bytes: int = 0
    seconds: float = 0.0


class Meter:
    """Counts traffic; safe to call from several threads.

    path: JSONL file, one row per call, appended; "{rank}" in it becomes the rank.
    sample_every: `due(key)` is true for the first and then every n-th message of a key.
    warn_error: relative error above which a key is warned about; None means 2.5 times what the
        scheme does to Gaussian data.
    rank: warnings about what was not compressed are said on rank 0 only.
    """

    def __init__(
        self,
        path: str | Path | None = None,
        *,
        sample_every: int = 100,
        warn_error: float | None = None,
        rank: int = 0,
    ) -> None:
        if sample_every < 1:
            raise ValueError(f"sample_every is {sample_every}, it must be at least 1")
        if warn_error is not None and not warn_error > 0:
            raise ValueError(f"warn_error is {warn_error}, it must be > 0, or None for the default")
        self.path = None if path is None else Path(str(path).replace("{rank}", str(rank)))
        self.sample_every = sample_every
        self.warn_error = warn_error
        self.rank = rank
        self._lock = threading.Lock()
        self._file: TextIO | None = None
        self.reset()

    def reset(self) -> None:
        """Forget all counts; what was already warned about may be said again."""
        with self._lock:
            self._sums: dict[tuple[str, str, str], _Sum] = {}
            self._errors: dict[tuple[str, str], float] = {}
            self._seen: dict[str, int] = {}
            self._warned: set[tuple[str, str]] = set()
            self._plain: dict[str, list[str]] = {}
            self._deferred: deque[tuple[Callable[[], bool], Callable[[], None]]] = deque()

    def defer(self, done: Callable[[], bool], finish: Callable[[], None]) -> None:
        """Call `finish`, which records something, after `done()` has become true.

        It is asked whenever something is deferred or read here, the oldest first.
        """
        with self._lock:
            self._deferred.append((done, finish))
        self.settle()

    def settle(self) -> None:
        """Record what was deferred and is known by now."""
        while True:
            with self._lock:
                if not self._deferred or not self._deferred[0][0]():
                    return
                _, finish = self._deferred.popleft()
            finish()

    def record(
        self,
        op: str,
        key: str | None,
        scheme: Scheme | str,
        raw_bytes: int,
        wire_bytes: int,
        seconds: float,
    ) -> None:
        """Count one call of `op` on `key`: bytes of the tensor, bytes this rank sent, seconds."""
        name, text = key or "", str(scheme)
        with self._lock:
            total = self._sums.setdefault((op, name, text), _Sum())
            total.calls += 1
            total.raw_bytes += raw_bytes
            total.wire_bytes += wire_bytes
            total.seconds += seconds
            self._write(
                op=op, key=key, scheme=text,
                raw_bytes=raw_bytes, wire_bytes=wire_bytes, seconds=seconds,
            )  # fmt: skip

    def due(self, key: str) -> bool:
        """Whether the error of this message of `key` should be measured; counts the message."""
        with self._lock:
            seen = self._seen.get(key, 0)
            self._seen[key] = seen + 1
        return seen % self.sample_every == 0

    def record_error(self, key: str | None, scheme: Scheme | str, rel_err: float) -> None:
        """Remember a sampled relative L2 error and warn, once per key and scheme, if remarkable.

        A NaN is remembered and not warned about: a non-finite gradient is GradScaler's business.
        """
        name, text = key or "", str(scheme)
        bound = self.warn_error
        if bound is None:
            bound = REMARKABLE * typical_error(text)
        with self._lock:
            self._errors.pop((name, text), None)
            self._errors[name, text] = rel_err  # the last of all: what `scalars` has of a key
            self._write(key=key, scheme=text, rel_err=rel_err if math.isfinite(rel_err) else None)
            new = rel_err > bound and (name, text) not in self._warned
            if new:
                self._warned.add((name, text))
        if new:
            logger.warning(
                "%s: relative error %.3g under %s is above %.3g. Outliers may own its blocks: "
                "keep it exact with a rule (scheme fp32, key %r), or use a smaller block or more "
                "bits.",
                name or "an anonymous tensor", rel_err, text, bound, name or "*",
            )  # fmt: skip

    def not_compressed(self, key: str | None, reason: str) -> None:
        """Note that `key` was asked to be compressed and travels raw; says each reason once."""
        name = key or "an anonymous tensor"
        with self._lock:
            names = self._plain.setdefault(reason, [])
            first = not names
            if name not in names:
                names.append(name)
        if first and self.rank == 0:
            logger.warning(
                "%s is NOT compressed: %s. Others with the same reason are not reported again; "
                "the stats table lists them.",
                name, reason,
            )  # fmt: skip

    def rows(self) -> list[dict[str, Any]]:
        """One row per (op, key, scheme), in order of first use.

        `rel_err` is the last sample of a message of one named tensor; those of the tensors in a
        bucket, and of anonymous ones, are in `errors`.
        """
        self.settle()
        with self._lock:
            return [
                {
                    "op": op,
                    "key": key,
                    "scheme": scheme,
                    "calls": total.calls,
                    "raw_bytes": total.raw_bytes,
                    "wire_bytes": total.wire_bytes,
                    "ratio": _ratio(total.raw_bytes, total.wire_bytes),
                    "seconds": total.seconds,
                    "rel_err": self._errors.get((key, scheme)),
                }
                for (op, key, scheme), total in self._sums.items()
            ]

    def errors(self) -> dict[tuple[str, str], float]:
        """Last sampled relative error per (key, scheme); anonymous tensors have the key ""."""
        self.settle()
        with self._lock:
            return dict(self._errors)

    def scalars(self) -> dict[str, float]:
        """Totals and errors as flat numbers, the form TensorBoard and Prometheus clients take."""
        rows = self.rows()
        raw = sum(row["raw_bytes"] for row in rows)
        wire = sum(row["wire_bytes"] for row in rows)
        out = {
            "commlib/calls": float(sum(row["calls"] for row in rows)),
            "commlib/raw_bytes": float(raw),
            "commlib/wire_bytes": float(wire),
            "commlib/seconds": float(sum(row["seconds"] for row in rows)),
            "commlib/ratio": _ratio(raw, wire),
        }
        with self._lock:
            out |= {
                f"commlib/rel_err/{key or '(anonymous)'}": error
                for (key, _), error in self._errors.items()
            }
            out["commlib/not_compressed"] = float(sum(map(len, self._plain.values())))
        return out

    def table(self, top: int = 20) -> str:
        """A readable summary: traffic by wire bytes, largest errors, what was not compressed."""
        rows = sorted(self.rows(), key=lambda row: -row["wire_bytes"])
        traffic = [
            (r["op"], r["key"], r["scheme"], r["calls"], r["raw_bytes"] / 1e6,
             r["wire_bytes"] / 1e6, r["ratio"], 1e3 * r["seconds"] / r["calls"])
            for r in rows[:top]
        ]  # fmt: skip
        names = ("op", "key", "scheme", "calls", "raw MB", "wire MB", "ratio", "ms/call")
        parts = [tabulate(traffic, headers=names, floatfmt=".4g")]
        if len(rows) > top:
            parts.append(f"... and {len(rows) - top} more rows")
        errors = sorted(self.errors().items(), key=lambda item: -item[1])
        if errors:
            worst = [(key, scheme, error) for (key, scheme), error in errors[:top]]
            parts.append(tabulate(worst, headers=("key", "scheme", "rel_err"), floatfmt=".3g"))
        with self._lock:
            for reason, plain in self._plain.items():
                shown = ", ".join(plain[:top]) + (", ..." if len(plain) > top else "")
                parts.append(f"not compressed ({len(plain)}): {reason}: {shown}")
        return "\n\n".join(parts)

    def close(self) -> None:
        """Close the JSONL file; the counts stay, a later call reopens the file."""
        self.settle()
        with self._lock:
            if self._file is not None:
                self._file.close()
                self._file = None

    def _write(self, **row: Any) -> None:
        if self.path is None:
            return
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # line buffered: one write per row, so ranks may append to one file
            self._file = self.path.open("a", buffering=1, encoding="utf-8")
        self._file.write(json.dumps({"time": time.time(), "rank": self.rank} | row) + "\n")


def _ratio(raw: float, wire: float) -> float:
    return raw / wire if wire else float("inf") if raw else 1.0
