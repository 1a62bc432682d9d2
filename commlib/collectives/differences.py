"""all_gather of differences: parts that change little from one gather to the next, such as weights.

    all ranks hold the rows r of all ranks, as they last made them
    rank k sends    Q(x - r_k)
    all ranks       r_k += Q(x - r_k)  for every k, the sender too: the same bits everywhere

An update of a thousandth of a weight, in 4 bits, has the error of the update, not of the weight;
what rounding loses stays in the next difference (SDP4Bit, Jia et al. 2024, arXiv 2410.15526). The
first time the rows travel raw. Exact segments always do, so that they are exact. Of elements that
were not finite all ranks go on from zero: the next finite parts arrive whole.
"""

from __future__ import annotations

import torch

from commlib_kernels.layout import Layout

from ..copies import Copies, clean
from ..feedback import Compressor, Key, names_of
from ..traffic import Transport
from . import two_phase
from .base import Step, Steps, runs, span
from .pool import Pool


def all_gather(
    out: torch.Tensor,
    x: torch.Tensor,
    transport: Transport,
    compressor: Compressor,
    key: Key,
    layout: Layout,
    pool: Pool,
    copies: Copies,
    *,
    unchanged: bool = False,
) -> Steps:
    """`out` becomes what all ranks now hold of the ranks' `x`; arguments as in `two_phase`.

    unchanged: no rank's x has changed since the last time, so that nothing need travel.
    """
    if transport.size == 1:
        out.copy_(x)
        return
    parts = [x[run] for run in runs(layout)]
    now = parts[0] if len(parts) == 1 else torch.cat(parts)
    rows, known = copies.of(names_of(key), layout.sizes, now)
    if not known:
        own = rows[transport.rank].clone()
        while not (yield Step.PARKED):
            pass
        with span("exchange"):
            exchange = transport.all_gather(rows.view(-1), own)
        yield exchange
    if not (known and unchanged):
        if not clean(rows):  # no difference to what is not finite ever is
            rows.nan_to_num_(0.0, 0.0, 0.0)
        for segment, (start, size) in enumerate(zip(_starts(layout), layout.sizes, strict=True)):
            if layout.is_exact(segment):
                rows[:, start : start + size] = 0
        together = Layout(layout.sizes, layout.dtype, exact=layout.exact)
        yield from two_phase.all_gather(
            rows.view(-1),
            now - rows[transport.rank],
            transport,
            compressor,
            key,
            together,
            pool,
            add=True,
        )
    columns = out.view(transport.size, -1)
    strips = rows.split(layout.sizes, 1) if layout.offsets else [rows]
    for run, strip in zip(runs(layout), strips, strict=True):
        columns[:, run] = strip


def _starts(layout: Layout) -> tuple[int, ...]:
    return Layout(layout.sizes).starts
