// Bit planes: the codes of C columns to and from their bytes.
//
// Byte i of row[r] is the code of row r, column c + i. The plane of w bits holds it in byte
// (r mod w) n/8 + c + i of the plane, at bit r / w * w: C columns at a time, in one word.
#pragma once

#include "rows.cuh"

struct Bytes {
    u32 row[ROWS];

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int r = 0; r < ROWS; r++) row[r] = 0;
    }
};

template <int WIDTH>
__device__ __forceinline__ constexpr u32 mask() {
    return ((1u << WIDTH) - 1) * 0x01010101u;
}

// The plane of WIDTH bits whose lowest bit is bit `shift` of the codes; moves on to the next.
template <int C, int WIDTH>
__device__ __forceinline__ void put_plane(const Bytes& q, u8*& p, int columns, int& shift) {
#pragma unroll
    for (int r = 0; r < WIDTH; r++) {
        u32 word = 0;
#pragma unroll
        for (int j = 0; j < ROWS / WIDTH; j++) {
            word |= ((q.row[j * WIDTH + r] >> shift) & mask<WIDTH>()) << (j * WIDTH);
        }
        store_bytes<C>(p + r * columns, word);
    }
    p += WIDTH * columns;
    shift += WIDTH;
}

template <int C>
__device__ __forceinline__ void put_planes(const Bytes& q, u8* p, int columns, int bits) {
    int shift = 0;
    if (bits & 8) {
#pragma unroll
        for (int r = 0; r < ROWS; r++) store_bytes<C>(p + r * columns, q.row[r]);
        return;
    }
    if (bits & 4) put_plane<C, 4>(q, p, columns, shift);
    if (bits & 2) put_plane<C, 2>(q, p, columns, shift);
    if (bits & 1) put_plane<C, 1>(q, p, columns, shift);
}

template <int C, int WIDTH>
__device__ __forceinline__ void get_plane(Bytes& q, const u8*& p, int columns, int& shift) {
#pragma unroll
    for (int r = 0; r < WIDTH; r++) {
        const u32 word = load_bytes<C>(p + r * columns);
#pragma unroll
        for (int j = 0; j < ROWS / WIDTH; j++) {
            q.row[j * WIDTH + r] |= ((word >> (j * WIDTH)) & mask<WIDTH>()) << shift;
        }
    }
    p += WIDTH * columns;
    shift += WIDTH;
}

template <int C>
__device__ __forceinline__ void get_planes(Bytes& q, const u8* p, int columns, int bits) {
    if (bits & 8) {
#pragma unroll
        for (int r = 0; r < ROWS; r++) q.row[r] = load_bytes<C>(p + r * columns);
        return;
    }
    q.clear();
    int shift = 0;
    if (bits & 4) get_plane<C, 4>(q, p, columns, shift);
    if (bits & 2) get_plane<C, 2>(q, p, columns, shift);
    if (bits & 1) get_plane<C, 1>(q, p, columns, shift);
}

// What formats share whose codes are bytes in planes.
struct InPlanes {
    typedef Bytes Codes;

    const int width;  // bits of a code

    __device__ __forceinline__ void nothing(Codes& q) const { q.clear(); }

    template <int C>
    __device__ __forceinline__ void put(const Codes& q, u8* block, int columns, int c) const {
        put_planes<C>(q, block + c, columns, width);
    }

    template <int C>
    __device__ __forceinline__ void get(Codes& q, const u8* block, int columns, int c) const {
        get_planes<C>(q, block + c, columns, width);
    }
};
