// The residual of error feedback: fp32, bf16, or int8 with a scale per block.
//
//     v = g + alpha h        h' = carry h + omega (v - Q(v))
#pragma once

#include "sources.cuh"

struct Residual {
    i64 kind;  // NONE where the piece has none or holds it
    i64 address, scales;
    float alpha, carry, omega, scale;

    __device__ __forceinline__ Residual(const Call& call, const Piece& piece)
        : kind(piece.flags & IS_HELD ? i64(NONE) : call.memory_kind),
          address(call.residual + piece.memory * itemsize(call.memory_kind)),
          scales(call.residual_scales + 2 * piece.memory_block),
          alpha(call.alpha), carry(call.carry), omega(call.omega), scale(0.0f) {}

    __device__ __forceinline__ bool kept() const { return kind != NONE; }

    __device__ __forceinline__ bool vectors() const {
        return !kept() || divides(address, 4 * itemsize(kind));
    }

    // The scale of an int8 residual; before any row of the block is read.
    __device__ __forceinline__ void open(const Block& b) {
        if (kind == INT8 && b.n) scale = bf16_value(at<const u16>(scales)[b.index]);
    }

    template <int C, Kind KIND>
    __device__ __forceinline__ void row(i64 first, float (&h)[C]) const {
        if constexpr (KIND == INT8) {
            const u32 word = load_bytes<C>(at<const u8>(address) + first);
#pragma unroll
            for (int i = 0; i < C; i++) h[i] = signed_byte(word, i) * scale;
        } else {
            load_row<C, KIND>(address, first, h);
        }
    }

    template <int C>
    __device__ __forceinline__ void row(i64 first, float (&h)[C]) const {
        if (kind == FP32)
            row<C, FP32>(first, h);
        else if (kind == BF16)
            row<C, BF16>(first, h);
        else
            row<C, INT8>(first, h);
    }

    template <int C, Kind KIND>
    __device__ __forceinline__ void add_rows(const Block& b, int c, float (&v)[ROWS][C]) const {
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            if (!inside<C>(b, r, c)) continue;
            float h[C];
            row<C, KIND>(b.start + r * b.columns + c, h);
#pragma unroll
            for (int i = 0; i < C; i++) v[r][i] = v[r][i] + alpha * h[i];
        }
    }

    template <int C>
    __device__ __forceinline__ void add(const Block& b, int c, float (&v)[ROWS][C]) const {
        if (kind == FP32)
            add_rows<C, FP32>(b, c, v);
        else if (kind == BF16)
            add_rows<C, BF16>(b, c, v);
        else if (kind == INT8)
            add_rows<C, INT8>(b, c, v);
    }

    __device__ __forceinline__ float element(const Block& b, int r, int c, float g) {
        if (!kept()) return g;
        open(b);
        float h[1];
        row(b.start + r * b.columns + c, h);
        return g + alpha * h[0];
    }

    // v becomes the new residual; zero says that the block was a zero block.
    template <class Coder, int C>
    __device__ __forceinline__ void errors(
        const Coder& coder, const typename Coder::Codes& q, float block_scale, bool zero,
        const Block& b, int c, float (&v)[ROWS][C]) const {
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            float decoded[C];
            coder.values(q, r, block_scale, decoded);
            error_row<C, Coder::SCALED>(decoded, zero, b, r, c, v[r]);
        }
    }

    template <int C, bool SCALED>
    __device__ __forceinline__ void error_row(
        const float (&decoded)[C], bool zero, const Block& b, int r, int c, float (&v)[C]) const {
        const bool real = inside<C>(b, r, c);
        float h[C] = {};
        if (real && (carry != 0.0f || !SCALED)) row(b.start + r * b.columns + c, h);
#pragma unroll
        for (int i = 0; i < C; i++) {
            float e = omega * (v[i] - decoded[i]);
            if (carry != 0.0f) e = carry * h[i] + e;
            if (!SCALED) e = (bits(e) & MAGNITUDE) < 0x7F800000 ? e : h[i];
            v[i] = real && !zero ? e : 0.0f;
        }
    }

    template <int C>
    __device__ __forceinline__ void store(const Block& b, int c, const float (&h)[ROWS][C]) const {
        if (kind == FP32)
            store_rows<C, FP32>(address, b, c, h);
        else if (kind == BF16)
            store_rows<C, BF16>(address, b, c, h);
    }

    // As 8-bit integers of a new scale; inv is 0 for scale 0, which forgets whatever h is.
    template <int C>
    __device__ __forceinline__ void store_int8(
        const Block& b, int c, float inv, const float (&h)[ROWS][C]) const {
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            if (!inside<C>(b, r, c)) continue;
            u32 sums[C];
#pragma unroll
            for (int i = 0; i < C; i++) {
                sums[i] = bits(fmaxf(fminf(h[r][i] * inv, 127.0f), -127.0f) + INTEGER);
            }
            u8* p = at<u8>(address) + b.start + r * b.columns + c;
            store_bytes<C>(p, inv == 0.0f ? 0 : low_bytes(sums));
        }
    }
};
