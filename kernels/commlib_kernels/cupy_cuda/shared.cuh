// One scale for a whole segment: a first pass over all that a message holds of it.
//
// Elements of a group are counted in wire order, across its pieces. A warp sums a run of 4096 of
// them; then a warp per group sums the runs in the same order, and writes the scale.
#pragma once

#include "emit.cuh"

// The last group whose runs begin at or before `run`.
__device__ __forceinline__ int group_of(const Call& call, i64 run) {
    const i64* first = at<const i64>(call.first_runs);
    int low = 0, high = int(call.groups);
    while (high - low > 1) {
        const int middle = (low + high) / 2;
        if (first[middle] <= run)
            low = middle;
        else
            high = middle;
    }
    return low;
}

template <class Source>
__device__ __forceinline__ void measure(const Call& call) {
    const i64 run = warp_id();
    if (run >= call.runs) return;
    const int group = group_of(call, run);
    const Piece* pieces = at<const Piece>(call.pieces);
    i64 skipped = (run - at<const i64>(call.first_runs)[group]) * RUN;  // still to pass over
    double sum = 0.0;
    u32 m = 0;
    i64 place = 0;  // within the run, of the next piece's first element
    for (int k = 0; k < call.group_pieces && place < RUN; k++) {
        const Piece& piece = pieces[group + k * call.group_step];
        if (piece.flags & IS_EXACT) continue;
        if (piece.numel <= skipped) {
            skipped -= piece.numel;
            continue;
        }
        const Source source(call, piece);
        Residual h(call, piece);
        const i64 left = piece.numel - skipped, count = left < RUN - place ? left : RUN - place;
        // Element i of the run is lane i mod 32's.
        for (i64 i = (lane_id() - place) & 31; i < count; i += 32) {
            const i64 e = skipped + i;
            const Block b = block_at(call, piece, e / call.block);
            const int o = int(e - b.start);
            const int r = o / b.columns, c = o - r * b.columns;
            const float v = h.element(b, r, c, source.element(b, r, c));
            const u32 a = bits(v) & MAGNITUDE;
            m = a > m ? a : m;
            if (call.rule != ABSMAX) sum += norm_term(call.rule, v);
        }
        place += count;
        skipped = 0;
    }
    m = warp_max(m, 32);
    const double total = lane_total(sum);
    if (lane_id() == 0) {
        at<double>(call.run_sums)[run] = total;
        at<u32>(call.peaks)[run] = m;
    }
}

// A warp per group: the runs' sums and maxima to the group's scale.
__device__ __forceinline__ void shared_scales(const Call& call) {
    const i64 group = warp_id();
    if (group >= call.groups) return;
    const i64* first = at<const i64>(call.first_runs);
    const Piece* pieces = at<const Piece>(call.pieces);
    double sum = 0.0;
    u32 m = 0;
    for (i64 run = first[group] + lane_id(); run < first[group + 1]; run += 32) {
        sum += at<const double>(call.run_sums)[run];
        const u32 a = at<const u32>(call.peaks)[run];
        m = a > m ? a : m;
    }
    m = warp_max(m, 32);
    const double total = lane_total(sum);
    i64 n = 0;
    for (int k = 0; k < call.group_pieces; k++) {
        const Piece& piece = pieces[group + k * call.group_step];
        if (!(piece.flags & IS_EXACT)) n += piece.numel;
    }
    if (lane_id() == 0) {
        at<u32>(call.scales)[group] = scale_bits(call.rule, call.levels, m, total, n);
    }
}

#define MEASURES(name, ...)                                                                \
    KERNEL(measure_quantize_##name, 4, measure<FromTensor>)                                   \
    KERNEL(measure_reduce_##name, 4, measure<FromWires<__VA_ARGS__>>)
