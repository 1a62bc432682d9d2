// What the host tells a kernel (launch.py), and where a warp finds its work.
//
// A warp works on one tile: blocks of one piece, `lanes` lanes to a block. Seen as eight rows, element
// row * n / 8 + column of a block of n, a column is a group of random numbers. A lane holds
//
//     four columns at once, in registers, with vector accesses, where all blocks of the tile are full
//     one column at a time otherwise (short, odd, unaligned or very long blocks), read for each pass
//
// The template argument C says which.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

enum Kind { FP32, FP16, BF16, INT8, NONE };
enum Rule { ABSMAX, L2, MEAN, UNSCALED, FIT, UNBIASED };
enum Flag { IS_EXACT = 1, IS_HELD = 2 };

constexpr int ROWS = 8, COLUMNS = 4, UNIT = ROWS * COLUMNS;
constexpr int EXACT_TILE = 1024;
constexpr int RUN = 4096;

struct Piece {
    i64 offset, numel, code, scale, base, key, flags, memory, memory_block, group, tile, unused;
};

struct Call {
    i64 pieces, piece_count, tiles;
    i64 x, dtype, exact_dtype, wire;
    i64 wires, payloads, stride, dense, add;
    i64 residual, memory_kind, residual_scales;
    i64 block, bits, rule, per_segment, stochastic, lanes;
    i64 step, step_at, rank, seed;
    i64 groups, group_step, group_pieces, first_runs, runs;
    i64 run_sums, peaks, scales, signs;
    float levels, factor, alpha, carry, omega, unused;
    float table[32];
};

// What lies at an address of the device's memory: said to be global, or the compiler would take care
// of shared and local memory too.
template <class T>
__device__ __forceinline__ T* at(i64 address) {
    return static_cast<T*>(__cvta_global_to_generic(address));
}

// The same address, of which the compiler knows nothing more. Where a loop moves many addresses on
// together, NVRTC before 13.5 looks for the best way to count them all, for hours.
__device__ __forceinline__ i64 opaque(i64 address) {
    asm("" : "+l"(address));
    return address;
}

__device__ __forceinline__ int lane_id() { return threadIdx.x & 31; }

__device__ __forceinline__ i64 warp_id() {
    return i64(blockIdx.x) * (blockDim.x >> 5) + (threadIdx.x >> 5);
}

// The last piece that begins at or before a tile; empty ones begin where the next one does.
__device__ __forceinline__ const Piece& piece_of(const Call& call, i64 tile) {
    const Piece* pieces = at<const Piece>(call.pieces);
    int low = 0, high = int(call.piece_count);
    while (high - low > 1) {
        const int middle = (low + high) / 2;
        if (pieces[middle].tile <= tile)
            low = middle;
        else
            high = middle;
    }
    return pieces[low];
}

// lanes = 1 << log_lanes share a block. Shifts: a division costs as much as coding an element.
__device__ __forceinline__ int log_lanes(const Call& call) { return 31 - __clz(int(call.lanes)); }

__device__ __forceinline__ int blocks_per_tile(const Call& call) {
    return call.lanes < 32 ? 32 >> log_lanes(call) : 1;
}

// Which block of the tile is this lane's.
__device__ __forceinline__ int lane_block(const Call& call) { return lane_id() >> log_lanes(call); }

// One block of a piece, as its lanes see it. n is 0 where the tile has fewer blocks.
struct Block {
    i64 start;    // its first element within the piece
    i64 index;    // within the piece
    int n;        // elements
    int columns;  // ceil(n / 8)
};

__device__ __forceinline__ Block block_at(const Call& call, const Piece& piece, i64 index) {
    Block b;
    b.index = index;
    b.start = index * call.block;
    const i64 left = piece.numel - b.start;
    b.n = left <= 0 ? 0 : int(left < call.block ? left : call.block);
    b.columns = (b.n + 7) >> 3;
    return b;
}

__device__ __forceinline__ i64 first_block(const Call& call, const Piece& piece, i64 tile) {
    return (tile - piece.tile) * blocks_per_tile(call);
}

// Whether all blocks of the tile are full, and short enough for one unit of four columns a lane.
__device__ __forceinline__ bool whole_tile(const Call& call, const Piece& piece, i64 first) {
    return call.block % UNIT == 0 && call.block <= call.lanes * UNIT &&
           (first + blocks_per_tile(call)) * call.block <= piece.numel;
}

__device__ __forceinline__ u32 warp_max(u32 m, int lanes) {
    for (int k = lanes >> 1; k > 0; k >>= 1) {
        const u32 other = __shfl_xor_sync(~0u, m, k);
        m = other > m ? other : m;
    }
    return m;
}

__device__ __forceinline__ bool divides(i64 address, i64 bytes) { return (address & (bytes - 1)) == 0; }

__device__ __forceinline__ i64 itemsize(i64 kind) { return kind == FP32 ? 4 : kind == INT8 ? 1 : 2; }

// Whether row r of column c holds an element: padding does not.
template <int C>
__device__ __forceinline__ bool inside(const Block& b, int r, int c) {
    return C == COLUMNS || r * b.columns + c < b.n;
}
