// The lanes that hold a whole block in registers, four columns each; where rotations and fitted scales
// let all elements of a block meet.
//
// Up to 32 lanes are a part of a warp. More than that, 64 or 128, are a CUDA block, which then has no
// other work. Full blocks of 32 elements a lane meet by shuffles; others in shared memory, which has a
// place for every element.
#pragma once

#include "planes.cuh"

constexpr u32 HUGE_ROTATED = 0x78800000;  // 2^114
constexpr int SIGNS = 4096;               // elements after which the signs of a rotation repeat

// A lane's columns: all four at once, or one after the other where blocks are short, odd or unaligned.
template <int C>
struct Unit {
    float v[COLUMNS / C][ROWS][C];
};

__device__ __forceinline__ float power(int k) { return floats(u32(127 + k) << 23); }

// Shared memory of a CUDA block. (A function of its own: all templates use the same.)
__device__ __forceinline__ float* shared_floats() {
    __shared__ float all[4 * 32 * UNIT];
    return all;
}

// The tile of this lane's group, among those of the launch.
__device__ __forceinline__ i64 group_tile(const Call& call) {
    return call.lanes > 32 ? i64(blockIdx.x) : warp_id();
}

struct Group {
    const int lanes, lane, together;  // together: lanes of a warp that belong to this group
    float* const shared;

    __device__ __forceinline__ explicit Group(const Call& call)
        : lanes(int(call.lanes)), lane(int(threadIdx.x) & (lanes - 1)),
          together(lanes < 32 ? lanes : 32),
          shared(shared_floats() + UNIT * (int(threadIdx.x) - lane)) {}

    // What lanes wrote to shared memory before, all of them may read after.
    __device__ __forceinline__ void sync() const {
        if (lanes > 32)
            __syncthreads();
        else
            __syncwarp();
    }

    __device__ __forceinline__ u32 maximum(u32 m) const {
        m = warp_max(m, together);
        if (lanes <= 32) return m;
        sync();
        if (lane_id() == 0) shared[lane >> 5] = floats(m);
        sync();
        for (int w = 0; w < lanes >> 5; w++) {
            const u32 other = bits(shared[w]);
            m = other > m ? other : m;
        }
        return m;
    }

    // To shared memory, once all have read what was there.
    template <int C>
    __device__ __forceinline__ void write(const Block& b, const Unit<C>& x) const {
        sync();
#pragma unroll 1
        for (int k = 0; k < COLUMNS / C; k++) {
            const int c = lane * COLUMNS + k * C;
            if (c >= b.columns) break;
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
#pragma unroll
                for (int i = 0; i < C; i++) shared[r * b.columns + c + i] = x.v[k][r][i];
            }
        }
        sync();
    }

    // The columns of a lane of the group.
    template <int C>
    __device__ __forceinline__ void read(const Block& b, int from, Unit<C>& x) const {
#pragma unroll 1
        for (int k = 0; k < COLUMNS / C; k++) {
            const int c = from * COLUMNS + k * C;
            if (c >= b.columns) break;
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
#pragma unroll
                for (int i = 0; i < C; i++) x.v[k][r][i] = shared[r * b.columns + c + i];
            }
        }
    }

    // Sum of the block's elements in halves. x is 0 where there is none.
    template <int C>
    __device__ __forceinline__ float half_sum(const Block& b, const Unit<C>& x) const {
        if constexpr (C == COLUMNS) {
            if (b.n == UNIT * lanes) return full_sum(x.v[0]);  // the same for all of a tile
        }
        sync();
        for (int i = lane; i < UNIT * lanes; i += lanes) shared[i] = 0.0f;
        write(b, x);
#pragma unroll 1
        for (int h = UNIT * lanes / 2; h > 0; h >>= 1) {
            for (int i = lane; i < h; i += lanes) shared[i] = shared[i] + shared[i + h];
            sync();
        }
        return shared[0];
    }

    __device__ __forceinline__ float full_sum(const float (&x)[ROWS][COLUMNS]) const {
        float sums[COLUMNS];
#pragma unroll
        for (int i = 0; i < COLUMNS; i++) {
            const float even = (x[0][i] + x[4][i]) + (x[2][i] + x[6][i]);
            const float odd = (x[1][i] + x[5][i]) + (x[3][i] + x[7][i]);
            sums[i] = even + odd;
        }
#pragma unroll 1
        for (int k = lanes >> 1; k > 0; k >>= 1) {
            float others[COLUMNS];
            if (k < 32) {
#pragma unroll
                for (int i = 0; i < COLUMNS; i++) others[i] = __shfl_xor_sync(~0u, sums[i], k);
            } else {
                sync();
#pragma unroll
                for (int i = 0; i < COLUMNS; i++) shared[i * lanes + lane] = sums[i];
                sync();
#pragma unroll
                for (int i = 0; i < COLUMNS; i++) others[i] = shared[i * lanes + (lane ^ k)];
            }
#pragma unroll
            for (int i = 0; i < COLUMNS; i++) sums[i] = sums[i] + others[i];
        }
        return (sums[0] + sums[2]) + (sums[1] + sums[3]);
    }
};

// The randomised Hadamard transform of a block: reference/rotation.py.
struct Rotation {
    const Group& group;
    const Block& b;
    const u32* const signs;  // 4096 bits; null where the format has no rotation
    const u32 place;         // of the block's first element, among them
    const int width;         // elements with padding, which is rotated too

    __device__ __forceinline__ Rotation(
        const Call& call, const Piece& piece, const Group& group, const Block& b)
        : group(group), b(b), signs(call.signs ? at<const u32>(call.signs) : nullptr),
          place(u32(piece.base + b.start)), width(ROWS * b.columns) {}

    // A short block is rotated in pieces, which are powers of two: 2^exponent has element e.
    __device__ __forceinline__ int exponent(int e) const { return 31 - __clz(e ^ width); }

    template <int C>
    __device__ __forceinline__ void forward(Unit<C>& x) const {
        flip<C, false>(x);
        hadamard(x);
    }

    template <int C>
    __device__ __forceinline__ void backward(Unit<C>& x) const {
        hadamard(x);
        flip<C, true>(x);
    }

    template <int C, bool BACK>
    __device__ __forceinline__ void flip(Unit<C>& x) const {
#pragma unroll 1
        for (int k = 0; k < COLUMNS / C; k++) {
            const int c = group.lane * COLUMNS + k * C;
            if (c >= b.columns) break;
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
                const int e = r * b.columns + c;
                const float factor = power(-((exponent(e) + BACK) >> 1));
                const u32 p = (place + u32(e)) & (SIGNS - 1);
                const u32 word = signs[p >> 5] >> (p & 31);
#pragma unroll
                for (int i = 0; i < C; i++) {
                    x.v[k][r][i] = floats(bits(x.v[k][r][i] * factor) ^ (word >> i << 31));
                }
            }
        }
    }

    template <int C>
    __device__ __forceinline__ void hadamard(Unit<C>& x) const {
        if constexpr (C == COLUMNS)
            in_registers(x);
        else
            in_memory(x);
    }

    // Full blocks, whose rows, lanes and columns are powers of two.
    __device__ __forceinline__ void in_registers(Unit<COLUMNS>& x) const {
        float(&v)[ROWS][COLUMNS] = x.v[0];
#pragma unroll
        for (int h = ROWS / 2; h > 0; h >>= 1) {
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
#pragma unroll
                for (int i = 0; i < COLUMNS; i++) {
                    if (!(r & h)) butterfly(v[r][i], v[r | h][i]);
                }
            }
        }
#pragma unroll 1
        for (int k = group.lanes >> 1; k > 0; k >>= 1) {
            Unit<COLUMNS> other;
            if (k < 32) {
#pragma unroll
                for (int r = 0; r < ROWS; r++) {
#pragma unroll
                    for (int i = 0; i < COLUMNS; i++) {
                        other.v[0][r][i] = __shfl_xor_sync(~0u, v[r][i], k);
                    }
                }
            } else {
                group.write(b, x);
                group.read(b, group.lane ^ k, other);
            }
            const bool upper = group.lane & k;
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
#pragma unroll
                for (int i = 0; i < COLUMNS; i++) {
                    const float o = other.v[0][r][i];
                    v[r][i] = upper ? o - v[r][i] : v[r][i] + o;
                }
            }
        }
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            butterfly(v[r][0], v[r][2]), butterfly(v[r][1], v[r][3]);
            butterfly(v[r][0], v[r][1]), butterfly(v[r][2], v[r][3]);
        }
    }

    // Any block, in as many steps as the longest takes, so that all blocks of a tile meet.
    __device__ __forceinline__ void in_memory(Unit<1>& x) const {
        group.write(b, x);
#pragma unroll 1
        for (int h = UNIT * group.lanes / 2; h > 0; h >>= 1) {
            for (int p = group.lane; p < width / 2; p += group.lanes) {
                const int e = (p & -h) << 1 | (p & (h - 1));
                if (e < width && (e ^ width) >= 2 * h) {  // both in one piece
                    butterfly(group.shared[e], group.shared[e + h]);
                }
            }
            group.sync();
        }
        group.read(b, group.lane, x);
    }

    __device__ __forceinline__ static void butterfly(float& a, float& b) {
        const float sum = a + b, difference = a - b;
        a = sum, b = difference;
    }
};
