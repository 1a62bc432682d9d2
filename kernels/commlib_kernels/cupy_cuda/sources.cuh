// Where the numbers to be coded come from: a tensor, or the sum of what all ranks sent.
#pragma once

#include "planes.cuh"

struct FromTensor {
    i64 kind, address;

    __device__ __forceinline__ FromTensor(const Call& call, const Piece& piece)
        : kind(call.dtype), address(call.x + piece.offset * itemsize(call.dtype)) {}

    __device__ __forceinline__ bool vectors() const { return divides(address, 4 * itemsize(kind)); }

    // C columns from column c on; zeros beyond the block's end.
    template <int C>
    __device__ __forceinline__ void unit(const Block& b, int c, float (&v)[ROWS][C]) const {
        load_rows(kind, address, b, c, v);
    }

    // Row r of column c alone, for norms, whose sums have an order of their own.
    __device__ __forceinline__ float element(const Block& b, int r, int c) const {
        return load_element(kind, address, b.start + r * b.columns + c);
    }
};

// The scale of a block in the payload that begins at `payload`.
template <class Coder>
__device__ __forceinline__ float scale_in(
    const Call& call, const Piece& piece, const u8* payload, i64 index) {
    if (!Coder::SCALED) return 1.0f;
    const u16* scales = reinterpret_cast<const u16*>(payload + piece.scale);
    return bf16_value(scales[Coder::NORMS && call.per_segment ? 0 : index]);
}

template <class Coder>
struct FromWires {
    const Call& call;
    const Piece& piece;
    const Coder coder;

    __device__ __forceinline__ FromWires(const Call& call, const Piece& piece)
        : call(call), piece(piece), coder(call) {}

    __device__ __forceinline__ bool vectors() const { return true; }

    template <int C>
    __device__ __forceinline__ void unit(const Block& b, int c, float (&v)[ROWS][C]) const {
        sum(b, c, v);
        times_factor(b, c, v);
    }

    // Of what was decoded, padding too.
    template <int C>
    __device__ __forceinline__ void sum(const Block& b, int c, float (&v)[ROWS][C]) const {
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
#pragma unroll
            for (int i = 0; i < C; i++) v[r][i] = 0.0f;
        }
        const i64 codes = piece.code + b.start / 8 * call.bits;
#pragma unroll(Coder::NORMS ? 1 : 4)  // loads of four payloads at a time
        for (int rank = 0; rank < call.payloads; rank++) {
            const u8* payload = at<const u8>(opaque(call.wires + rank * call.stride));
            const float scale = scale_in<Coder>(call, piece, payload, b.index);
            typename Coder::Codes q;
            coder.template get<C>(q, payload + codes, b.columns, c);
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
                float decoded[C];
                coder.values(q, r, scale, decoded);
#pragma unroll
                for (int i = 0; i < C; i++) v[r][i] += decoded[i];
            }
        }
    }

    template <int C>
    __device__ __forceinline__ void times_factor(const Block& b, int c, float (&v)[ROWS][C]) const {
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            const bool real = inside<C>(b, r, c);
#pragma unroll
            for (int i = 0; i < C; i++) v[r][i] = real ? v[r][i] * call.factor : 0.0f;
        }
    }

    __device__ __forceinline__ float element(const Block& b, int r, int c) const {
        float v[ROWS][1], found = 0.0f;
        unit<1>(b, c, v);
#pragma unroll
        for (int k = 0; k < ROWS; k++) found = k == r ? v[k][0] : found;
        return found;
    }
};
