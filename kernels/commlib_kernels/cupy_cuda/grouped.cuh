// The three ops for formats whose blocks are rotated, or have a scale that suits their codes.
#pragma once

#include "emit.cuh"
#include "group.cuh"
#include "ops.cuh"

// A lane's work on one tile of such a format.
template <class Coder, bool FITTED, int C>
struct Grouped {
    typedef typename Coder::Codes Codes;
    static constexpr int PARTS = COLUMNS / C;

    const Call& call;
    const Piece& piece;
    const i64 first;
    const Group group;
    const Coder coder;
    const Block b;
    const Rotation rotation;
    const bool rotated;
    Block coded;  // the block whose elements have codes: padding is rotated too
    Residual h;
    u32 word = 0;  // bf16 bits of the scale

    __device__ __forceinline__ Grouped(const Call& call, const Piece& piece, i64 first)
        : call(call), piece(piece), first(first), group(call), coder(call),
          b(block_at(call, piece, first + lane_block(call))), rotation(call, piece, group, b),
          rotated(call.signs != 0), coded(b), h(call, piece) {
        if (rotated) coded.n = rotation.width;
    }

    __device__ __forceinline__ int column(int k) const { return group.lane * COLUMNS + k * C; }
    __device__ __forceinline__ bool mine(int k) const { return column(k) < b.columns; }

    // What is coded, without the residual.
    __device__ __forceinline__ void fill(const FromTensor& x, Unit<C>& v) const {
#pragma unroll 1
        for (int k = 0; k < PARTS; k++) {
            if (mine(k)) x.template unit<C>(b, column(k), v.v[k]);
        }
    }

    // Sums of payloads are taken as they are coded, and rotated back.
    __device__ __forceinline__ void fill(const FromWires<Coder>& wires, Unit<C>& v) const {
#pragma unroll 1
        for (int k = 0; k < PARTS; k++) {
            if (mine(k)) wires.template sum<C>(b, column(k), v.v[k]);
        }
        if (rotated) rotation.backward(v);
#pragma unroll 1
        for (int k = 0; k < PARTS; k++) {
            if (mine(k)) wires.template times_factor<C>(b, column(k), v.v[k]);
        }
    }

    __device__ __forceinline__ u32 top(const Unit<C>& x) const {
        u32 m = 0;
#pragma unroll 1
        for (int k = 0; k < PARTS; k++) m = unit_max(x.v[k], m);
        return group.maximum(m);
    }

    // Sum of a norm, which has an order of its own: all lanes of a warp on one block after another.
    __device__ __forceinline__ double norm(const Unit<C>& y) const {
        group.write(b, y);
        double mine = 0.0;
        for (int k = 0; k < blocks_per_tile(call); k++) {
            const int n = ROWS * block_at(call, piece, first + k).columns;
            const float* elements = group.shared + (k - lane_block(call)) * UNIT * group.lanes;
            double sum = 0.0;
            for (int e = lane_id(); e < n; e += 32) sum += norm_term(call.rule, elements[e]);
            const double total = lane_total(sum);
            if (lane_block(call) == k) mine = total;
        }
        return mine;
    }

    // In halves; padding of blocks that are not rotated does not count.
    __device__ __forceinline__ float sum_of_products(
        const Unit<C>& x, const Unit<C>& y, Unit<C>& products) const {
#pragma unroll 1
        for (int k = 0; k < PARTS; k++) {
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
                const bool real = mine(k) && inside<C>(coded, r, column(k));
#pragma unroll
                for (int i = 0; i < C; i++) {
                    products.v[k][r][i] = real ? x.v[k][r][i] * y.v[k][r][i] : 0.0f;
                }
            }
        }
        return group.half_sum(coded, products);
    }

    __device__ __forceinline__ void times(Unit<C>& x, float factor) const {
#pragma unroll 1
        for (int k = 0; k < PARTS; k++) {
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
#pragma unroll
                for (int i = 0; i < C; i++) x.v[k][r][i] = x.v[k][r][i] * factor;
            }
        }
    }

    __device__ __forceinline__ void values(
        const Codes (&q)[PARTS], float scale, Unit<C>& x) const {
#pragma unroll 1
        for (int k = 0; k < PARTS; k++) {
#pragma unroll
            for (int r = 0; r < ROWS; r++) coder.values(q[k], r, scale, x.v[k][r]);
        }
    }

    __device__ __forceinline__ void code(const Unit<C>& y, float inv, Codes (&q)[PARTS]) const {
        const Stream stream = stream_of(call, piece, b);
#pragma unroll 1
        for (int k = 0; k < PARTS; k++) {
            if (call.stochastic)
                coder.template code<C, true>(y.v[k], inv, stream, column(k), q[k]);
            else
                coder.template code<C, false>(y.v[k], inv, stream, column(k), q[k]);
        }
    }

    // Codes, and the scale that suits them, of a block with the maximum m.
    __device__ __forceinline__ void fit(const Unit<C>& y, u32 m, Codes (&q)[PARTS]) {
        Unit<C> z = y, c;
        times(z, floats((254 - (m >> 23)) << 23));
        const float n = float(coded.n), rms = sqrtf(sum_of_products(z, z, c) / n);
        const float inv = 1.0f / rms * floats((254 - (m >> 23)) << 23);
        code(y, inv, q);
        values(q, 1.0f, c);
        z = y;
        times(z, inv);
        const float along = sum_of_products(c, z, z);
        const float ratio = call.rule == FIT ? along / sum_of_products(c, c, z) : n / along;
        word = bf16_nearest(rms * ratio * floats(m >> 23 << 23));
        if (word >= HUGE_BITS >> 16) word = BAD_SCALE;
    }

    // Codes of y = v, rotated; and their scale, to the wire too.
    __device__ __forceinline__ void find_codes(const Unit<C>& y, Codes (&q)[PARTS]) {
        u32 m = top(y);
        if (rotated && m >= HUGE_ROTATED) m = HUGE_BITS;
        if constexpr (FITTED) {
            fit(y, m, q);
            if (m >= HUGE_BITS) word = BAD_SCALE;
            if (m < TINY_BITS) word = 0;
        } else {
            double total = 0.0;
            if (Coder::NORMS && call.rule != ABSMAX) total = norm(y);
            word = scale_bits(Coder::NORMS ? call.rule : i64(ABSMAX), call.levels, m, total, coded.n);
            code(y, 1.0f / bf16_value(word), q);
        }
        if (word == 0 || word == BAD_SCALE) {
#pragma unroll 1
            for (int k = 0; k < PARTS; k++) coder.nothing(q[k]);
        }
        if (group.lane == 0 && b.n) at<u16>(call.wire + piece.scale)[b.index] = u16(word);
    }

    __device__ __forceinline__ void quantize(const FromTensor& x) {
        Unit<C> v = {};
        fill(x, v);
        emit(v);
    }

    // dense: where the piece goes, if not into a wire.
    __device__ __forceinline__ void reduce(const FromWires<Coder>& wires, i64 dense) {
        Unit<C> v = {};
        fill(wires, v);
        if (!call.dense) return emit(v);
#pragma unroll 1
        for (int k = 0; k < PARTS; k++) {
            if (mine(k)) store_rows<C>(call.dtype, dense, b, column(k), v.v[k]);
        }
    }

    // Codes of v and the residual, which it becomes.
    __device__ __forceinline__ void emit(Unit<C>& v) {
        h.open(b);
#pragma unroll 1
        for (int k = 0; k < PARTS; k++) {
            if (mine(k)) h.template add<C>(b, column(k), v.v[k]);
        }
        Unit<C> y = v;
        if (rotated) rotation.forward(y);
        Codes q[PARTS];
        find_codes(y, q);
        u8* codes = at<u8>(call.wire + piece.code) + b.start / 8 * call.bits;
#pragma unroll 1
        for (int k = 0; k < PARTS; k++) {
            if (mine(k)) coder.template put<C>(q[k], codes, b.columns, column(k));
        }
        if (!h.kept()) return;
        values(q, bf16_value(word), y);
        if (rotated) rotation.backward(y);
        renew(v, y);
    }

    // The residual of v, which decodes to y.
    __device__ __forceinline__ void renew(Unit<C>& v, const Unit<C>& y) const {
        const bool renews = word != BAD_SCALE;  // not that of a block that is not finite
        u32 m = 0;
#pragma unroll 1
        for (int k = 0; k < PARTS; k++) {
            if (!mine(k)) continue;
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
                h.template error_row<C, true>(y.v[k][r], word == 0, b, r, column(k), v.v[k][r]);
            }
            m = unit_max(v.v[k], m);
            if (renews) h.template store<C>(b, column(k), v.v[k]);
        }
        if (h.kind != INT8) return;
        const u32 scale = residual_scale(group.maximum(m));
        if (!renews) return;
        if (group.lane == 0 && b.n) at<u16>(h.scales)[b.index] = u16(scale);
        const float inv = scale ? 1.0f / bf16_value(scale) : 0.0f;
#pragma unroll 1
        for (int k = 0; k < PARTS; k++) {
            if (mine(k)) h.template store_int8<C>(b, column(k), inv, v.v[k]);
        }
    }

    __device__ __forceinline__ void dequantize(const FromTensor& x) const {
        const u8* wire = at<const u8>(call.wire);
        const u8* codes = wire + piece.code + b.start / 8 * call.bits;
        const float scale = b.n ? scale_in<Coder>(call, piece, wire, b.index) : 0.0f;
        Unit<C> y = {};
#pragma unroll 1
        for (int k = 0; k < PARTS; k++) {
            if (!mine(k)) continue;
            Codes q;
            coder.template get<C>(q, codes, b.columns, column(k));
#pragma unroll
            for (int r = 0; r < ROWS; r++) coder.values(q, r, scale, y.v[k][r]);
        }
        if (rotated) rotation.backward(y);
#pragma unroll 1
        for (int k = 0; k < PARTS; k++) {
            if (!mine(k)) continue;
            if (call.add) {
                float v[ROWS][C];
                x.template unit<C>(b, column(k), v);
#pragma unroll
                for (int r = 0; r < ROWS; r++) {
#pragma unroll
                    for (int i = 0; i < C; i++) y.v[k][r][i] = v[r][i] + y.v[k][r][i];
                }
            }
            store_rows<C>(x.kind, x.address, b, column(k), y.v[k]);
        }
    }
};

// The tile of a launch, if there is one for this lane: exact pieces have a warp each.
#define TILE_OF_GROUP(EXACT)                                                               \
    const i64 tile = group_tile(call);                                                     \
    if (tile >= call.tiles) return;                                                        \
    const Piece& piece = piece_of(call, tile);                                             \
    const i64 first = first_block(call, piece, tile);                                      \
    if (piece.flags & IS_EXACT) {                                                          \
        if (call.lanes <= 32 || threadIdx.x < 32) EXACT(call, piece, tile);                \
        return;                                                                            \
    }

template <class Coder, bool FITTED = false>
__device__ __forceinline__ void quantize_grouped(const Call& call) {
    TILE_OF_GROUP(quantize_exact)
    const FromTensor x(call, piece);
    if (whole_tile(call, piece, first) && x.vectors() && Residual(call, piece).vectors())
        Grouped<Coder, FITTED, COLUMNS>(call, piece, first).quantize(x);
    else
        Grouped<Coder, FITTED, 1>(call, piece, first).quantize(x);
}

template <class Coder, bool FITTED = false>
__device__ __forceinline__ void dequantize_grouped(const Call& call) {
    TILE_OF_GROUP(dequantize_exact)
    const FromTensor x(call, piece);
    if (whole_tile(call, piece, first) && x.vectors())
        Grouped<Coder, FITTED, COLUMNS>(call, piece, first).dequantize(x);
    else
        Grouped<Coder, FITTED, 1>(call, piece, first).dequantize(x);
}

template <class Coder, bool FITTED = false>
__device__ __forceinline__ void reduce_grouped(const Call& call) {
    TILE_OF_GROUP(reduce_exact)
    const FromWires<Coder> wires(call, piece);
    const i64 dense = call.x + piece.memory * itemsize(call.dtype);
    const bool vectors =
        call.dense ? divides(dense, 4 * itemsize(call.dtype)) : Residual(call, piece).vectors();
    if (whole_tile(call, piece, first) && vectors)
        Grouped<Coder, FITTED, COLUMNS>(call, piece, first).reduce(wires, dense);
    else
        Grouped<Coder, FITTED, 1>(call, piece, first).reduce(wires, dense);
}

#define GROUPED(name, ...)                                                                 \
    KERNEL(quantize_##name, 3, quantize_grouped<__VA_ARGS__>)                              \
    KERNEL(dequantize_##name, 3, dequantize_grouped<__VA_ARGS__>)                          \
    KERNEL(reduce_##name, 3, reduce_grouped<__VA_ARGS__>)
