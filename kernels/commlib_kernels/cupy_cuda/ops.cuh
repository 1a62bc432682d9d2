// The three ops over tiles. KERNELS(name, Coder) in a .cu file makes a format's kernels.
#pragma once

#include "emit.cuh"

// Pieces that travel raw: copied, added, or summed in fp32; lanes take neighbouring elements.
struct Exact {
    i64 first, last, kind;

    __device__ __forceinline__ Exact(const Call& call, const Piece& piece, i64 tile)
        : first((tile - piece.tile) * EXACT_TILE), kind(call.exact_dtype) {
        last = first + EXACT_TILE < piece.numel ? first + EXACT_TILE : piece.numel;
    }
};

__device__ __forceinline__ void copy_exact(const Exact& e, i64 to, i64 from) {
    for (i64 i = e.first + lane_id(); i < e.last; i += 32) {
        if (e.kind == FP32)
            at<u32>(to)[i] = at<const u32>(from)[i];
        else
            at<u16>(to)[i] = at<const u16>(from)[i];
    }
}

__device__ __forceinline__ void add_exact(const Exact& e, i64 to, i64 from) {
    for (i64 i = e.first + lane_id(); i < e.last; i += 32) {
        store_element(e.kind, to, i, load_element(e.kind, to, i) + load_element(e.kind, from, i));
    }
}

__device__ __forceinline__ void sum_exact(
    const Call& call, const Piece& piece, const Exact& e, i64 kind, i64 to) {
    for (i64 i = e.first + lane_id(); i < e.last; i += 32) {
        float sum = 0.0f;
        for (int rank = 0; rank < call.payloads; rank++) {
            sum += load_element(e.kind, call.wires + rank * call.stride + piece.code, i);
        }
        store_element(kind, to, i, sum * call.factor);
    }
}

__device__ __forceinline__ void quantize_exact(const Call& call, const Piece& piece, i64 tile) {
    const Exact e(call, piece, tile);
    copy_exact(e, call.wire + piece.code, call.x + piece.offset * itemsize(e.kind));
}

__device__ __forceinline__ void dequantize_exact(const Call& call, const Piece& piece, i64 tile) {
    const Exact e(call, piece, tile);
    const i64 x = call.x + piece.offset * itemsize(e.kind);
    if (call.add)
        add_exact(e, x, call.wire + piece.code);
    else
        copy_exact(e, x, call.wire + piece.code);
}

__device__ __forceinline__ void reduce_exact(const Call& call, const Piece& piece, i64 tile) {
    const Exact e(call, piece, tile);
    if (call.dense)
        sum_exact(call, piece, e, call.dtype, call.x + piece.memory * itemsize(call.dtype));
    else
        sum_exact(call, piece, e, e.kind, call.wire + piece.code);
}

template <class Coder>
__device__ __forceinline__ void quantize(const Call& call) {
    const i64 tile = warp_id();
    if (tile >= call.tiles) return;
    const Piece& piece = piece_of(call, tile);
    if (piece.flags & IS_EXACT) return quantize_exact(call, piece, tile);
    emit<Coder>(call, piece, tile, FromTensor(call, piece));
}

template <class Coder, int C>
__device__ __forceinline__ void dequantize_tile(
    const Call& call, const Piece& piece, i64 first, const FromTensor& x) {
    const Coder coder(call);
    const int lanes = int(call.lanes);
    const Block b = block_at(call, piece, first + lane_block(call));
    const u8* wire = at<const u8>(call.wire);
    const u8* codes = wire + piece.code + b.start / 8 * call.bits;
    const float scale = b.n ? scale_in<Coder>(call, piece, wire, b.index) : 0.0f;
#pragma unroll 1
    for (int c = (lane_id() & (lanes - 1)) * C; c < b.columns; c += lanes * C) {
        typename Coder::Codes q;
        coder.template get<C>(q, codes, b.columns, c);
        float v[ROWS][C] = {};
        if (call.add) x.template unit<C>(b, c, v);
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            float decoded[C];
            coder.values(q, r, scale, decoded);
#pragma unroll
            for (int i = 0; i < C; i++) v[r][i] = call.add ? v[r][i] + decoded[i] : decoded[i];
        }
        store_rows(x.kind, x.address, b, c, v);
    }
}

template <class Coder>
__device__ __forceinline__ void dequantize(const Call& call) {
    const i64 tile = warp_id();
    if (tile >= call.tiles) return;
    const Piece& piece = piece_of(call, tile);
    if (piece.flags & IS_EXACT) return dequantize_exact(call, piece, tile);
    const FromTensor x(call, piece);
    const i64 first = first_block(call, piece, tile);
    if (whole_tile(call, piece, first) && x.vectors())
        dequantize_tile<Coder, COLUMNS>(call, piece, first, x);
    else
        dequantize_tile<Coder, 1>(call, piece, first, x);
}

template <int C, class Source>
__device__ __forceinline__ void store_dense(
    const Call& call, const Piece& piece, i64 first, const Source& source, i64 address) {
    const int lanes = int(call.lanes);
    const Block b = block_at(call, piece, first + lane_block(call));
#pragma unroll 1
    for (int c = (lane_id() & (lanes - 1)) * C; c < b.columns; c += lanes * C) {
        float v[ROWS][C];
        source.template unit<C>(b, c, v);
        store_rows(call.dtype, address, b, c, v);
    }
}

template <class Coder>
__device__ __forceinline__ void reduce(const Call& call) {
    const i64 tile = warp_id();
    if (tile >= call.tiles) return;
    const Piece& piece = piece_of(call, tile);
    if (piece.flags & IS_EXACT) return reduce_exact(call, piece, tile);
    const FromWires<Coder> source(call, piece);
    if (!call.dense) return emit<Coder>(call, piece, tile, source);
    const i64 first = first_block(call, piece, tile);
    const i64 address = call.x + piece.memory * itemsize(call.dtype);
    if (whole_tile(call, piece, first) && divides(address, 4 * itemsize(call.dtype)))
        store_dense<COLUMNS>(call, piece, first, source, address);
    else
        store_dense<1>(call, piece, first, source, address);
}

// `blocks` of 128 threads at least are to fit on a multiprocessor: 4 leave a thread 128 registers, 3
// leave it 168, which the loads of four payloads at a time take.
#ifndef KERNEL  // the host shim of the tests has its own
#define KERNEL(name, blocks, ...)                                                          \
    extern "C" __global__ void __launch_bounds__(128, blocks)                              \
        name(const __grid_constant__ Call call) {                                          \
        __VA_ARGS__(call);                                                                 \
    }
#endif

#define KERNELS(name, ...)                                                                 \
    KERNEL(quantize_##name, 4, quantize<__VA_ARGS__>)                                      \
    KERNEL(dequantize_##name, 4, dequantize<__VA_ARGS__>)                                  \
    KERNEL(reduce_##name, 3, reduce<__VA_ARGS__>)
