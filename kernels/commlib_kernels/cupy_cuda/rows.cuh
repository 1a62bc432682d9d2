// C neighbouring elements: four in one 64- or 128-bit access, or a single one.
#pragma once

#include "numbers.cuh"

template <int C, Kind KIND>
__device__ __forceinline__ void load_row(i64 address, i64 first, float (&out)[C]) {
    if constexpr (C == 1) {
        out[0] = load_element(KIND, address, first);
    } else if constexpr (KIND == FP32) {
        const uint4 w = *reinterpret_cast<const uint4*>(at<const u32>(address) + first);
        out[0] = floats(w.x), out[1] = floats(w.y), out[2] = floats(w.z), out[3] = floats(w.w);
    } else {
        const uint2 w = *reinterpret_cast<const uint2*>(at<const u16>(address) + first);
        if constexpr (KIND == BF16) {
            out[0] = floats(w.x << 16), out[1] = floats(w.x & 0xFFFF0000);
            out[2] = floats(w.y << 16), out[3] = floats(w.y & 0xFFFF0000);
        } else {
            out[0] = fp16_value(w.x & 0xFFFF), out[1] = fp16_value(w.x >> 16);
            out[2] = fp16_value(w.y & 0xFFFF), out[3] = fp16_value(w.y >> 16);
        }
    }
}

template <int C, Kind KIND>
__device__ __forceinline__ void store_row(i64 address, i64 first, const float (&v)[C]) {
    if constexpr (C == 1) {
        store_element(KIND, address, first, v[0]);
    } else if constexpr (KIND == FP32) {
        uint4 w;
        w.x = settled(v[0]), w.y = settled(v[1]), w.z = settled(v[2]), w.w = settled(v[3]);
        *reinterpret_cast<uint4*>(at<u32>(address) + first) = w;
    } else {
        u32 h[C];
#pragma unroll
        for (int i = 0; i < C; i++) h[i] = KIND == BF16 ? bf16_nearest(v[i]) : fp16_nearest(v[i]);
        uint2 w;
        w.x = h[0] | h[1] << 16, w.y = h[2] | h[3] << 16;
        *reinterpret_cast<uint2*>(at<u16>(address) + first) = w;
    }
}

// All rows of a unit. One branch on the element type for all of them, not one for each.
template <int C, Kind KIND>
__device__ __forceinline__ void load_rows(
    i64 address, const Block& b, int c, float (&v)[ROWS][C]) {
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        if (inside<C>(b, r, c))
            load_row<C, KIND>(address, b.start + r * b.columns + c, v[r]);
        else
            v[r][0] = 0.0f;
    }
}

template <int C>
__device__ __forceinline__ void load_rows(
    i64 kind, i64 address, const Block& b, int c, float (&v)[ROWS][C]) {
    if (kind == FP32)
        load_rows<C, FP32>(address, b, c, v);
    else if (kind == BF16)
        load_rows<C, BF16>(address, b, c, v);
    else
        load_rows<C, FP16>(address, b, c, v);
}

template <int C, Kind KIND>
__device__ __forceinline__ void store_rows(
    i64 address, const Block& b, int c, const float (&v)[ROWS][C]) {
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        if (inside<C>(b, r, c)) {
            store_row<C, KIND>(address, b.start + r * b.columns + c, v[r]);
        }
    }
}

template <int C>
__device__ __forceinline__ void store_rows(
    i64 kind, i64 address, const Block& b, int c, const float (&v)[ROWS][C]) {
    if (kind == FP32)
        store_rows<C, FP32>(address, b, c, v);
    else if (kind == BF16)
        store_rows<C, BF16>(address, b, c, v);
    else
        store_rows<C, FP16>(address, b, c, v);
}

// C bytes as one word, byte i the i-th.
template <int C>
__device__ __forceinline__ u32 load_bytes(const u8* p) {
    if constexpr (C == 1) return *p;
    return *reinterpret_cast<const u32*>(p);
}

template <int C>
__device__ __forceinline__ void store_bytes(u8* p, u32 word) {
    if constexpr (C == 1)
        *p = u8(word);
    else
        *reinterpret_cast<u32*>(p) = word;
}

// The low bytes of C words, as one.
template <int C>
__device__ __forceinline__ u32 low_bytes(const u32 (&x)[C]) {
    if constexpr (C == 1) return x[0] & 0xFF;
    else
        return __byte_perm(__byte_perm(x[0], x[1], 0x0040), __byte_perm(x[2], x[3], 0x0040), 0x5410);
}

// Byte i of a word, without and with its sign.
__device__ __forceinline__ u32 byte_of(u32 word, int i) { return (word >> (8 * i)) & 0xFF; }

__device__ __forceinline__ float signed_byte(u32 word, int i) {
    return float(int(word << (24 - 8 * i)) >> 24);
}

// Byte i of a word plus 2^23, as a float: without a conversion, which costs four times as much.
__device__ __forceinline__ float byte_float(u32 word, int i) {
    return floats(__byte_perm(word, 0x4B000000, 0x7540 | i));
}
