// The arithmetic of one element: scalar.py in CUDA C++. Compiled with -fmad=false -ftz=false, so that
// every product and every sum rounds by itself and subnormals stay.
#pragma once

#include "call.cuh"

constexpr u32 HUGE_BITS = 0x7E800000;  // 2^126
constexpr u32 TINY_BITS = 0x0D800000;  // 2^-100
constexpr u32 BAD_SCALE = 0x7FC0;
constexpr u32 NAN_BITS = 0x7FC00000;
constexpr u32 MAGNITUDE = 0x7FFFFFFF;

// 1.5 * 2^23: what is added to it is rounded to an integer, found in the low bits of the sum.
constexpr float INTEGER = 12582912.0f;

__device__ __forceinline__ u32 bits(float x) { return __float_as_uint(x); }
__device__ __forceinline__ float floats(u32 b) { return __uint_as_float(b); }
__device__ __forceinline__ u32 least(u32 a, u32 b) { return a < b ? a : b; }

__device__ __forceinline__ u32 bf16_up(float x) { return (bits(x) + 0xFFFF) >> 16; }

__device__ __forceinline__ u32 bf16_nearest(float x) {
    const u32 b = bits(x);
    const u32 near = (b + 0x7FFF + ((b >> 16) & 1)) >> 16;
    return (b & MAGNITUDE) <= 0x7F800000 ? near : 0x7FC0;
}

__device__ __forceinline__ float bf16_value(u32 b) { return floats(b << 16); }

// Integers of small non-negative numbers, ties to even and towards zero.
__device__ __forceinline__ u32 nearest_integer(float x) { return bits(x + INTEGER) & 0x3FFFFF; }
__device__ __forceinline__ u32 floor_integer(float x) {
    return bits(__fadd_rd(x, INTEGER)) & 0x3FFFFF;
}

__device__ __forceinline__ u32 fp16_nearest(float x) {
    const u32 b = bits(x), a = b & MAGNITUDE, sign = (b >> 16) & 0x8000;
    const u32 normal = (a + 0xFFF + ((a >> 13) & 1)) >> 13;
    // 2^-14 is the smallest normal: below it the steps are even, 2^-24 apart.
    const u32 even = nearest_integer(floats(least(a, 0x38800000)) * 16777216.0f);
    u32 half = a < 0x38800000 ? even : normal - (112 << 10);
    half = a >= 0x477FF000 ? 0x7C00 : half;
    return a <= 0x7F800000 ? sign | half : 0x7E00;
}

__device__ __forceinline__ float fp16_value(u32 h) {
    const u32 magnitude = (h & 0x7FFF) << 13;
    // A power of two moves the exponent's bias, and turns subnormals into normals.
    u32 value = bits(floats(magnitude) * floats(0x77800000));
    value = magnitude < 0x0F800000 ? value : magnitude | 0x7F800000;
    return floats(value | ((h & 0x8000) << 16));
}

// 16 random bits to the middle of one of 65536 cells of [0, 1).
__device__ __forceinline__ float uniform(u32 r) {
    // Exact: 1 + (R + 1/2) / 65536 has the bits R << 7 | 64 in its mantissa.
    return floats(0x3F800040 | r << 7) - 1.0f;
}

__device__ __forceinline__ u32 e4m3_nearest(float y) {
    const u32 b = bits(y), a = least(b & MAGNITUDE, 0x43E00000);
    const u32 normal = ((a + 0x7FFFF + ((a >> 20) & 1)) >> 20) - (120 << 3);
    const u32 even = nearest_integer(floats(least(a, 0x3C800000)) * 512.0f);
    return (a < 0x3C800000 ? even : normal) | ((b >> 24) & 0x80);
}

__device__ __forceinline__ u32 e4m3_stochastic(float y, u32 r) {
    const u32 b = bits(y), a = least(b & MAGNITUDE, 0x43E00000);
    const u32 normal = ((a + ((r << 4) | 8)) >> 20) - (120 << 3);
    const float small = floats(least(a, 0x3C800000)) * 512.0f;
    const u32 even = floor_integer(small + uniform(r));
    return (a < 0x3C800000 ? even : normal) | ((b >> 24) & 0x80);
}

__device__ __forceinline__ float e4m3_value(u32 c) {
    const u32 magnitude = c & 0x7F;
    const u32 normal = (magnitude << 20) + (120 << 23);
    const u32 even = bits((floats(0x4B000000 | magnitude) - 8388608.0f) * floats(0x3B000000));
    return floats((magnitude < 8 ? even : normal) | ((c & 0x80) << 24));
}

__device__ __forceinline__ u32 natural_code(float x, u32 add) {
    const u32 b = bits(x), magnitude = b & MAGNITUDE;
    const u32 exponent = least((magnitude + add) >> 23, 254);
    return magnitude < 0x7F800000 ? exponent | ((b >> 31) << 8) : 255;
}

__device__ __forceinline__ float natural_value(u32 exponent, u32 sign) {
    return floats(exponent == 255 ? NAN_BITS : (sign << 31) | (exponent << 23));
}

__device__ __forceinline__ float load_element(i64 kind, i64 address, i64 i) {
    if (kind == FP32) return at<const float>(address)[i];
    const u32 h = at<const u16>(address)[i];
    return kind == BF16 ? bf16_value(h) : fp16_value(h);
}

// One NaN for all NaNs.
__device__ __forceinline__ u32 settled(float v) { return v == v ? bits(v) : NAN_BITS; }

// Rounded to nearest even.
__device__ __forceinline__ void store_element(i64 kind, i64 address, i64 i, float v) {
    if (kind == FP32)
        at<u32>(address)[i] = settled(v);
    else
        at<u16>(address)[i] = u16(kind == BF16 ? bf16_nearest(v) : fp16_nearest(v));
}
