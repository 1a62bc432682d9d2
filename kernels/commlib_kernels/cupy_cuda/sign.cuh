// One bit an element times the mean magnitude; and natural compression, powers of two in nine bits.
#pragma once

#include "philox.cuh"
#include "planes.cuh"

// Byte i holds column c + i, bit r of it row r: its part of the plane of one bit.
struct Signs {
    u32 word;

    __device__ __forceinline__ u32 at(int r, int i) const { return (word >> (8 * i + r)) & 1; }
};

struct Sign {
    typedef Signs Codes;
    static constexpr bool SCALED = true, NORMS = true;

    __device__ __forceinline__ explicit Sign(const Call&) {}

    template <int C, bool STOCHASTIC>
    __device__ __forceinline__ void code(
        const float (&v)[ROWS][C], float, const Stream&, int, Codes& q) const {
        q.word = 0;
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
#pragma unroll
            for (int i = 0; i < C; i++) q.word |= (bits(v[r][i]) >> 31) << (8 * i + r);
        }
    }

    __device__ __forceinline__ void nothing(Codes& q) const { q.word = 0; }

    template <int C>
    __device__ __forceinline__ void values(
        const Codes& q, int r, float scale, float (&out)[C]) const {
#pragma unroll
        for (int i = 0; i < C; i++) out[i] = floats(bits(scale) ^ (q.at(r, i) << 31));
    }

    template <int C>
    __device__ __forceinline__ void put(const Codes& q, u8* block, int, int c) const {
        store_bytes<C>(block + c, q.word);
    }

    template <int C>
    __device__ __forceinline__ void get(Codes& q, const u8* block, int, int c) const {
        q.word = load_bytes<C>(block + c);
    }
};

// Exponents in the plane of eight bits, signs in the ninth.
struct Natural {
    struct Codes {
        Bytes exponents;
        Signs signs;
    };
    static constexpr bool SCALED = false, NORMS = false;

    __device__ __forceinline__ explicit Natural(const Call&) {}

    template <int C, bool STOCHASTIC>
    __device__ __forceinline__ void code(
        const float (&v)[ROWS][C], float, const Stream& stream, int c, Codes& q) const {
        q.signs.word = 0;
        q.exponents.clear();
#pragma unroll
        for (int i = 0; i < C; i++) {
            Words words;
            if (STOCHASTIC) words = stream.column(c + i);
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
                const u32 add = STOCHASTIC ? row_bits(words, r) << 7 | 64 : 0x400000;
                const u32 nine = natural_code(v[r][i], add);
                q.exponents.row[r] |= (nine & 0xFF) << (8 * i);
                q.signs.word |= (nine >> 8) << (8 * i + r);
            }
        }
    }

    __device__ __forceinline__ void nothing(Codes&) const {}

    template <int C>
    __device__ __forceinline__ void values(const Codes& q, int r, float, float (&out)[C]) const {
#pragma unroll
        for (int i = 0; i < C; i++) {
            out[i] = natural_value(byte_of(q.exponents.row[r], i), q.signs.at(r, i));
        }
    }

    template <int C>
    __device__ __forceinline__ void put(const Codes& q, u8* block, int columns, int c) const {
        put_planes<C>(q.exponents, block + c, columns, 8);
        store_bytes<C>(block + ROWS * columns + c, q.signs.word);
    }

    template <int C>
    __device__ __forceinline__ void get(Codes& q, const u8* block, int columns, int c) const {
        get_planes<C>(q.exponents, block + c, columns, 8);
        q.signs.word = load_bytes<C>(block + ROWS * columns + c);
    }
};
