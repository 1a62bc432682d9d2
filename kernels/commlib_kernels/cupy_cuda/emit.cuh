// Coding a tile: add the residual, find the scale, round, pack, keep the error; in one pass.
#pragma once

#include "philox.cuh"
#include "residual.cuh"

// bf16 bits of the scale, from the absolute maximum's bits and the norm's sum over n elements.
__device__ __forceinline__ u32 scale_bits(i64 rule, float levels, u32 m, double total, i64 n) {
    if (m >= HUGE_BITS) return BAD_SCALE;
    if (m < TINY_BITS) return 0;
    if (rule == MEAN) return bf16_nearest(float(total / double(n)));
    const float top = rule == L2 ? float(sqrt(total) / double(levels)) : floats(m) / levels;
    const u32 s = bf16_up(top);
    return s >= HUGE_BITS >> 16 ? BAD_SCALE : s;
}

// The same of an int8 residual: what it cannot hold is forgotten, not kept as NaN.
__device__ __forceinline__ u32 residual_scale(u32 m) {
    const u32 scale = scale_bits(ABSMAX, 127.0f, m, 0.0, 0);
    return scale == BAD_SCALE ? 0 : scale;
}

__device__ __forceinline__ double norm_term(i64 rule, float v) {
    return rule == L2 ? double(v) * double(v) : fabs(double(v));
}

// The 32 lanes' sums in their order; the total is lane 0's.
__device__ __forceinline__ double lane_total(double sum) {
    for (int k = 16; k > 0; k >>= 1) sum += __shfl_down_sync(~0u, sum, k);
    return __shfl_sync(~0u, sum, 0);
}

// The norm of every block of the tile, block by block with all lanes, as the order of sums wants it.
template <class Source>
__device__ __forceinline__ double block_norm(
    const Call& call, const Piece& piece, i64 first, const Source& source, Residual h) {
    double mine = 0.0;
    for (int k = 0; k < blocks_per_tile(call); k++) {
        const Block b = block_at(call, piece, first + k);
        double sum = 0.0;
        for (int e = lane_id(); e < b.n; e += 32) {
            const int r = e / b.columns, c = e - r * b.columns;
            sum += norm_term(call.rule, h.element(b, r, c, source.element(b, r, c)));
        }
        const double total = lane_total(sum);
        if (lane_block(call) == k) mine = total;
    }
    return mine;
}

__device__ __forceinline__ Stream stream_of(const Call& call, const Piece& piece, const Block& b) {
    Stream s;
    s.group = u64(piece.base + b.start) >> 3;
    s.step = u32(call.step_at ? *at<const i64>(call.step_at) : call.step);
    s.rank = u32(call.rank), s.seed = u32(call.seed), s.key = u32(piece.key);
    return s;
}

template <int C>
__device__ __forceinline__ u32 unit_max(const float (&v)[ROWS][C], u32 m) {
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
#pragma unroll
        for (int i = 0; i < C; i++) {
            const u32 a = bits(v[r][i]) & MAGNITUDE;
            m = a > m ? a : m;
        }
    }
    return m;
}

// A lane's work on one tile. Both ways to go through it, `in_registers` and `in_passes`, consist of
// these steps.
template <class Coder, class Source, int C>
struct Emitter {
    const Call& call;
    const Piece& piece;
    const Source& source;
    const i64 first;
    const int lanes, lane;
    const Coder coder;
    const Block b;
    Residual h;
    u32 word = 0x3F80;  // bf16 bits of the scale

    __device__ __forceinline__ Emitter(
        const Call& call, const Piece& piece, const Source& source, i64 first)
        : call(call), piece(piece), source(source), first(first), lanes(int(call.lanes)),
          lane(lane_id() & (lanes - 1)), coder(call),
          b(block_at(call, piece, first + lane_block(call))), h(call, piece) {
        h.open(b);
    }

    __device__ __forceinline__ void fill(int c, float (&v)[ROWS][C]) const {
        source.template unit<C>(b, c, v);
        h.template add<C>(b, c, v);
    }

    // From this lane's maximum: the block's scale, to the wire too.
    __device__ __forceinline__ void find_scale(u32 m) {
        if (!Coder::SCALED) return;
        const bool shared = Coder::NORMS && call.per_segment;
        if (shared) {
            word = at<const u32>(call.scales)[piece.group];
        } else {
            double norm = 0.0;
            m = warp_max(m, lanes);
            if (Coder::NORMS && call.rule != ABSMAX) {
                norm = block_norm(call, piece, first, source, h);
            }
            word = scale_bits(Coder::NORMS ? call.rule : i64(ABSMAX), call.levels, m, norm, b.n);
        }
        if (lane == 0 && b.n && !(shared && b.index)) {
            at<u16>(call.wire + piece.scale)[b.index] = u16(word);
        }
    }

    __device__ __forceinline__ void code(
        int c, const float (&v)[ROWS][C], typename Coder::Codes& q) const {
        const bool coded = word != 0 && word != BAD_SCALE;
        const float inv = coded ? 1.0f / bf16_value(word) : 0.0f;
        const Stream stream = stream_of(call, piece, b);
        if (!coded)
            coder.nothing(q);
        else if (call.stochastic)
            coder.template code<C, true>(v, inv, stream, c, q);
        else
            coder.template code<C, false>(v, inv, stream, c, q);
    }

    __device__ __forceinline__ void put(int c, const typename Coder::Codes& q) const {
        u8* codes = at<u8>(call.wire + piece.code) + b.start / 8 * call.bits;
        coder.template put<C>(q, codes, b.columns, c);
    }

    // Whether the residual changes: not that of a block that is not finite.
    __device__ __forceinline__ bool renews() const { return h.kept() && word != BAD_SCALE; }

    __device__ __forceinline__ void errors(
        int c, const typename Coder::Codes& q, float (&v)[ROWS][C]) const {
        h.template errors<Coder, C>(coder, q, bf16_value(word), word == 0, b, c, v);
    }

    // The scale of an int8 residual, from this lane's maximum of it; its reciprocal, or 0.
    __device__ __forceinline__ float find_residual_scale(u32 m) const {
        const u32 scale = residual_scale(warp_max(m, lanes));
        if (lane == 0 && b.n && renews()) at<u16>(h.scales)[b.index] = u16(scale);
        return scale ? 1.0f / bf16_value(scale) : 0.0f;
    }

    // A lane's four columns stay in registers from the first step to the last.
    __device__ __forceinline__ void in_registers() {
        const int c = lane * C;
        const bool mine = c < b.columns;
        float v[ROWS][C] = {};
        if (mine) fill(c, v);
        find_scale(unit_max(v, 0));
        typename Coder::Codes q;
        if (mine) {
            code(c, v, q);
            put(c, q);
        }
        if (!h.kept()) return;
        if (mine) errors(c, q, v);
        if (h.kind != INT8) {
            if (mine && renews()) h.template store<C>(b, c, v);
            return;
        }
        const float inv = find_residual_scale(mine ? unit_max(v, 0) : 0);
        if (mine && renews()) h.template store_int8<C>(b, c, inv, v);
    }

    // Column after column, all of them read again for every pass: maximum; codes; int8 residual.
    __device__ __forceinline__ void in_passes() {
        u32 m = 0;
        float inv = 0.0f;
        const int last = h.kind == INT8 ? 2 : 1;
#pragma unroll 1
        for (int pass = 0; pass <= last; pass++) {
#pragma unroll 1
            for (int c = lane; c < b.columns; c += lanes) {
                float v[ROWS][C];
                typename Coder::Codes q;
                fill(c, v);
                if (pass > 0) {
                    code(c, v, q);
                    if (pass == 1) put(c, q);
                    if (!renews()) continue;
                    errors(c, q, v);
                    if (h.kind != INT8) h.template store<C>(b, c, v);
                }
                if (pass == 2)
                    h.template store_int8<C>(b, c, inv, v);
                else
                    m = unit_max(v, m);
            }
            if (pass == 0) {
                find_scale(m);
                m = 0;
            } else if (pass < last) {
                inv = find_residual_scale(m);
            }
        }
    }
};

template <class Coder, class Source>
__device__ __forceinline__ void emit(
    const Call& call, const Piece& piece, i64 tile, const Source& source) {
    const i64 first = first_block(call, piece, tile);
    if (whole_tile(call, piece, first) && source.vectors() && Residual(call, piece).vectors())
        Emitter<Coder, Source, COLUMNS>(call, piece, source, first).in_registers();
    else
        Emitter<Coder, Source, 1>(call, piece, source, first).in_passes();
}
