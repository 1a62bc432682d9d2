// Codes of a table of up to 16 values (tables.py), in shared memory: the 32 words of a warp's copy lie
// in 32 banks, so that lanes which look up different values do not wait for each other.
#pragma once

#include "philox.cuh"
#include "planes.cuh"

struct Table : InPlanes {
    static constexpr bool SCALED = true, NORMS = false;
    static constexpr int THRESHOLDS = 16;  // place of the first, the middle between values 0 and 1

    const float* found;

    // For all lanes of a warp together.
    __device__ __forceinline__ explicit Table(const Call& call)
        : InPlanes{int(call.bits)}, found(copied(call)) {}

    __device__ __forceinline__ static const float* copied(const Call& call) {
        __shared__ float copies[4][32];
        float* mine = copies[threadIdx.x >> 5];
        mine[lane_id()] = call.table[lane_id()];
        __syncwarp();
        return mine;
    }

    // By halves: whether the value lies beyond the middle of those that are left.
    template <int C, bool STOCHASTIC>
    __device__ __forceinline__ void code(
        const float (&v)[ROWS][C], float inv, const Stream&, int, Codes& q) const {
        u32 number[ROWS][C] = {};
#pragma unroll 1
        for (u32 half = 1u << (width - 1); half > 0; half >>= 1) {
            const float* middle = found + THRESHOLDS + half - 1;
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
#pragma unroll
                for (int i = 0; i < C; i++) {
                    number[r][i] += v[r][i] * inv > middle[number[r][i]] ? half : 0;
                }
            }
        }
#pragma unroll
        for (int r = 0; r < ROWS; r++) q.row[r] = low_bytes(number[r]);
    }

    template <int C>
    __device__ __forceinline__ void values(
        const Codes& q, int r, float scale, float (&out)[C]) const {
#pragma unroll
        for (int i = 0; i < C; i++) out[i] = found[byte_of(q.row[r], i)] * scale;
    }
};
