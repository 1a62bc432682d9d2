"""One scale for a whole segment: its maximum and norm, over all pieces, before anything is coded.

A warp sums one run of 4096 elements of a group, as the byte contract orders them; then a warp puts
the runs of a group together in the same way.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from commlib_kernels.formats import Format
from commlib_kernels.launch import LANES, NUMEL, RUN
from commlib_kernels.numba_cuda import emit, sources
from commlib_kernels.numba_cuda.coders import Coder
from commlib_kernels.numba_cuda.jit import (
    add_f64,
    bits,
    device,
    lane,
    load32,
    load64,
    load_f64,
    square_f64,
    store32,
    store_f64,
    warp,
    warp_max,
    warp_sum,
    warps,
)
from commlib_kernels.numba_cuda.sources import Source
from commlib_kernels.numba_cuda.table import ROW, column, last_below

Function = Callable[..., Any]

u32, f32, f64 = np.uint32, np.float32, np.float64


def _run(fmt: Format, source: Source) -> Function:
    block, l2 = fmt.block, fmt.scale == "l2"
    element = emit.element_of(source, remembers=True)

    @device
    def sum_run(given, memory, table, group, run, run_sums, peaks):
        """Norm and maximum of one run; table: pieces, step and number of a group's rows, runs."""
        pieces, step, count, first_runs = table
        index = (run - load64(first_runs + 8 * group)) * RUN
        end = index + RUN
        total, m = f64(0), u32(0)
        i, first = 0, 0  # a piece of the group, and the index of its first element
        row = pieces + ROW * group
        numel = column(row, NUMEL)
        index += lane()
        while index < end:
            while i < count and index >= first + numel:
                first += numel
                i += 1
                if i < count:
                    row = pieces + ROW * (group + i * step)
                    numel = column(row, NUMEL)
            if i == count:
                break
            b = (index - first) // block
            start = b * block
            columns = (min(block, numel - start) + 7) >> 3
            v = element(given, memory, row, b, start, index - first - start, columns)
            m = max(m, bits(v) & u32(0x7FFFFFFF))
            x = f64(v)
            total = add_f64(total, square_f64(x) if l2 else abs(x))
            index += LANES
        total, m = warp_sum(total), warp_max(m, LANES)
        if lane() == 0:
            store_f64(run_sums + 8 * run, total)
            store32(peaks + 4 * run, m)

    return sum_run


def quantize_peaks(fmt: Format) -> Function:
    """The first kernel of `quantize`."""
    sum_run = _run(fmt, sources.tensor(fmt))

    def kernel(
        pieces, group_step, group_pieces, groups, first_runs, runs, run_sums, peaks, x, dtype,
        residual, memory_kind, residual_scales, alpha, carry, omega,
    ):  # fmt: skip
        memory = residual, memory_kind, residual_scales, f32(alpha), f32(carry), f32(omega)
        table = pieces, group_step, group_pieces, first_runs
        for run in range(warp(), runs, warps()):
            group = last_below(first_runs, 8, groups, run)
            sum_run((x, dtype), memory, table, group, run, run_sums, peaks)

    return kernel


def reduce_peaks(fmt: Format, coder: Coder) -> Function:
    """The first kernel of `reduce`."""
    sum_run = _run(fmt, sources.payloads(fmt, coder))

    def kernel(
        pieces, group_step, group_pieces, groups, first_runs, runs, run_sums, peaks,
        wires, payloads, stride, factor,
        residual, memory_kind, residual_scales, alpha, carry, omega,
    ):  # fmt: skip
        memory = residual, memory_kind, residual_scales, f32(alpha), f32(carry), f32(omega)
        given = wires, payloads, stride, f32(factor)
        table = pieces, group_step, group_pieces, first_runs
        for run in range(warp(), runs, warps()):
            group = last_below(first_runs, 8, groups, run)
            sum_run(given, memory, table, group, run, run_sums, peaks)

    return kernel


def combine(fmt: Format, coder: Coder) -> Function:
    """The second kernel: a scale for every group."""
    scale_of = coder.scale_of

    def kernel(
        pieces, group_step, group_pieces, groups, first_runs, run_sums, peaks, scales
    ):  # fmt: skip
        for group in range(warp(), groups, warps()):
            total, m, n = f64(0), u32(0), 0
            first = load64(first_runs + 8 * group)
            last = load64(first_runs + 8 * (group + 1))
            for run in range(first + lane(), last, LANES):
                total = add_f64(total, load_f64(run_sums + 8 * run))
                m = max(m, load32(peaks + 4 * run))
            for i in range(group_pieces):
                n += column(pieces + ROW * (group + i * group_step), NUMEL)
            total, m = warp_sum(total), warp_max(m, LANES)
            if lane() == 0:
                store32(scales + 4 * group, scale_of(m, total, n))

    return kernel
