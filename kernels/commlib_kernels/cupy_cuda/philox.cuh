// Philox4x32-10 (Salmon et al., SC 2011): a counter and a key to four random words.
#pragma once

#include "numbers.cuh"

struct Words {
    u32 w[4];
};

__device__ __forceinline__ Words philox(u64 group, u32 step, u32 rank, u32 seed, u32 key) {
    u32 c0 = u32(group), c1 = u32(group >> 32), c2 = step, c3 = rank, k0 = seed, k1 = key;
#pragma unroll
    for (int round = 0; round < 10; round++) {
        const u64 p0 = u64(c0) * 0xD2511F53u, p1 = u64(c2) * 0xCD9E8D57u;
        c0 = u32(p1 >> 32) ^ c1 ^ k0;
        c2 = u32(p0 >> 32) ^ c3 ^ k1;
        c1 = u32(p1);
        c3 = u32(p0);
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return {{c0, c1, c2, c3}};
}

// Where a block's random numbers come from; row r of a column is lane r of the column's group.
struct Stream {
    u64 group;  // of column 0
    u32 step, rank, seed, key;

    __device__ __forceinline__ Words column(int c) const {
        return philox(group + u64(c), step, rank, seed, key);
    }
};

__device__ __forceinline__ u32 row_bits(const Words& words, int row) {
    return row < 4 ? words.w[row] & 0xFFFF : words.w[row - 4] >> 16;
}
