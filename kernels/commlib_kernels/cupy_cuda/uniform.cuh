// int8 .. int2: integers in [-levels, levels], two's complement, times the block's scale.
#pragma once

#include "philox.cuh"
#include "planes.cuh"

// BITS is 0 where the call says how many. With 4 or 8 the scale is the maximum's, one per block.
template <int BITS>
struct Uniform : InPlanes {
    static constexpr bool SCALED = true, NORMS = BITS == 0;

    const float levels;

    __device__ __forceinline__ explicit Uniform(const Call& call)
        : InPlanes{BITS ? BITS : int(call.bits)}, levels(call.levels) {}

    template <int C, bool STOCHASTIC>
    __device__ __forceinline__ void code(
        const float (&v)[ROWS][C], float inv, const Stream& stream, int c, Codes& q) const {
        u32 sums[ROWS][C];
#pragma unroll
        for (int i = 0; i < C; i++) {
            Words words;
            if (STOCHASTIC) words = stream.column(c + i);
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
                const float y = v[r][i] * inv;
                if (STOCHASTIC) {
                    const float up = y + uniform(row_bits(words, r));
                    sums[r][i] = bits(__fadd_rd(fmaxf(fminf(up, levels), -levels), INTEGER));
                } else {
                    // No clamp: the scale was rounded up, so that |y| < levels + 1/2.
                    sums[r][i] = bits(y + INTEGER);
                }
            }
        }
        const u32 kept = ((1u << width) - 1) * 0x01010101u;
#pragma unroll
        for (int r = 0; r < ROWS; r++) q.row[r] = kept & low_bytes(sums[r]);
    }

    // code * scale: exact, 8 bits times 8 bits.
    template <int C>
    __device__ __forceinline__ void values(
        const Codes& q, int r, float scale, float (&out)[C]) const {
        const u32 half = 1u << (width - 1);
        const u32 word = q.row[r] ^ (half * 0x01010101u);
        const float zero = 8388608.0f + float(half);
#pragma unroll
        for (int i = 0; i < C; i++) out[i] = (byte_float(word, i) - zero) * scale;
    }
};
