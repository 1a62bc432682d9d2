// fp16 and bf16 (two bytes an element, no planes), and fp8 with a scale per block.
#pragma once

#include "philox.cuh"
#include "planes.cuh"

// Codes of 16 bits: columns 0, 1 and 2, 3 of every row.
struct Halves {
    u32 low[ROWS], high[ROWS];
};

template <Kind KIND>
struct Cast {
    typedef Halves Codes;
    static constexpr bool SCALED = false, NORMS = false;

    __device__ __forceinline__ explicit Cast(const Call&) {}

    __device__ __forceinline__ static u32 narrow(float v) {
        return KIND == BF16 ? bf16_nearest(v) : fp16_nearest(v);
    }
    __device__ __forceinline__ static float widen(u32 h) {
        return KIND == BF16 ? bf16_value(h) : fp16_value(h);
    }

    template <int C, bool STOCHASTIC>
    __device__ __forceinline__ void code(
        const float (&v)[ROWS][C], float, const Stream&, int, Codes& q) const {
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            q.low[r] = narrow(v[r][0]);
            if constexpr (C == COLUMNS) {
                q.low[r] |= narrow(v[r][1]) << 16;
                q.high[r] = narrow(v[r][2]) | narrow(v[r][3]) << 16;
            }
        }
    }

    __device__ __forceinline__ void nothing(Codes&) const {}

    template <int C>
    __device__ __forceinline__ void values(const Codes& q, int r, float, float (&out)[C]) const {
        out[0] = widen(q.low[r] & 0xFFFF);
        if constexpr (C == COLUMNS) {
            out[1] = widen(q.low[r] >> 16);
            out[2] = widen(q.high[r] & 0xFFFF), out[3] = widen(q.high[r] >> 16);
        }
    }

    template <int C>
    __device__ __forceinline__ void put(const Codes& q, u8* block, int columns, int c) const {
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            u16* p = reinterpret_cast<u16*>(block) + r * columns + c;
            if constexpr (C == 1) {
                *p = u16(q.low[r]);
            } else {
                uint2 w;
                w.x = q.low[r], w.y = q.high[r];
                *reinterpret_cast<uint2*>(p) = w;
            }
        }
    }

    template <int C>
    __device__ __forceinline__ void get(Codes& q, const u8* block, int columns, int c) const {
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            const u16* p = reinterpret_cast<const u16*>(block) + r * columns + c;
            if constexpr (C == 1) {
                q.low[r] = *p;
            } else {
                const uint2 w = *reinterpret_cast<const uint2*>(p);
                q.low[r] = w.x, q.high[r] = w.y;
            }
        }
    }
};

struct Fp8 : InPlanes {
    static constexpr bool SCALED = true, NORMS = false;

    __device__ __forceinline__ explicit Fp8(const Call&) : InPlanes{8} {}

    template <int C, bool STOCHASTIC>
    __device__ __forceinline__ void code(
        const float (&v)[ROWS][C], float inv, const Stream& stream, int c, Codes& q) const {
        q.clear();
#pragma unroll
        for (int i = 0; i < C; i++) {
            Words words;
            if (STOCHASTIC) words = stream.column(c + i);
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
                const float y = v[r][i] * inv;
                const u32 byte =
                    STOCHASTIC ? e4m3_stochastic(y, row_bits(words, r)) : e4m3_nearest(y);
                q.row[r] |= byte << (8 * i);
            }
        }
    }

    // e4m3 value times scale: exact, 4 bits times 8 bits.
    template <int C>
    __device__ __forceinline__ void values(
        const Codes& q, int r, float scale, float (&out)[C]) const {
#pragma unroll
        for (int i = 0; i < C; i++) out[i] = e4m3_value(byte_of(q.row[r], i)) * scale;
    }
};
