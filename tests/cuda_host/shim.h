// CUDA on a CPU, as much of it as commlib's kernels use: blocks, warps, shuffles, shared memory.
//
// The threads of a block are coroutines. At a shuffle a lane leaves its value and gives way; when all
// 32 of its warp have come to the same shuffle, they go on. At a barrier they wait for all warps of the
// block. A lane that ends while others wait, or that waits elsewhere than they do, is what deadlocks or
// reads garbage on a GPU: here it aborts. Lanes run one after the other, in even blocks from the first
// to the last and in odd ones backwards: what reads shared memory without a barrier reads old values.

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ucontext.h>

#define __device__
#define __shared__ static thread_local
#define __global__
#define __forceinline__ inline __attribute__((always_inline))
#define __grid_constant__
#define __launch_bounds__(...)

struct Dim {
    unsigned x;
};
struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};

inline thread_local Dim threadIdx, blockIdx, blockDim, gridDim;

namespace shim {

constexpr int WARP = 32, MOST = 128;  // lanes of a warp, threads of a block
constexpr size_t STACK = 256 << 10;
enum Site { NOWHERE, XOR, DOWN, FROM, WARP_BARRIER, BLOCK_BARRIER };

struct Lane {
    ucontext_t context;
    char* stack = nullptr;
    bool done = true;
    Site site = NOWHERE;     // where it waits
    unsigned count = 0;      // how often it waited
    unsigned long long slot[2];
};

inline thread_local Lane lanes[MOST];
inline thread_local ucontext_t scheduler;
inline thread_local int current;
inline thread_local void (*body)(const void*);
inline thread_local const void* argument;

[[noreturn]] inline void fail(const char* what) {
    std::fprintf(stderr, "shim: %s (block %u, thread %u)\n", what, blockIdx.x, threadIdx.x);
    std::abort();
}

inline void start() {
    body(argument);
    lanes[current].done = true;
}

inline void wait(Site site) {
    Lane& lane = lanes[current];
    lane.count++;
    lane.site = site;
    swapcontext(&lane.context, &scheduler);
}

// Leave a value at a shuffle, and return the value that lane `from` of the warp left.
template <class T>
T exchange(Site site, T value, int from) {
    Lane& lane = lanes[current];
    const unsigned turn = lane.count & 1;  // lanes are at most one shuffle apart
    lane.slot[turn] = 0;
    std::memcpy(&lane.slot[turn], &value, sizeof value);
    wait(site);
    T found;
    std::memcpy(&found, &lanes[current / WARP * WARP + from].slot[turn], sizeof found);
    return found;
}

// To where all lanes of a warp wait, or end. Says whether they ended.
inline bool advance(int warp) {
    int done = 0;
    for (int i = 0; i < WARP; i++) {
        current = WARP * warp + (blockIdx.x & 1 ? WARP - 1 - i : i);
        Lane& lane = lanes[current];
        if (!lane.done) {
            threadIdx.x = current;
            swapcontext(&scheduler, &lane.context);
        }
        done += lane.done;
    }
    if (done == WARP) return true;
    if (done) fail("some lanes ended while others wait");
    const Lane* all = lanes + WARP * warp;
    for (int i = 1; i < WARP; i++) {
        if (all[i].site != all[0].site || all[i].count != all[0].count) {
            fail("lanes wait at different places");
        }
    }
    return false;
}

inline void run_block(int warps) {
    for (int i = 0; i < WARP * warps; i++) {
        Lane& lane = lanes[i];
        if (!lane.stack) lane.stack = static_cast<char*>(std::malloc(STACK));
        getcontext(&lane.context);
        lane.context.uc_stack.ss_sp = lane.stack;
        lane.context.uc_stack.ss_size = STACK;
        lane.context.uc_link = &scheduler;
        lane.done = false;
        lane.count = 0;
        makecontext(&lane.context, start, 0);
    }
    // From barrier to barrier: a warp that ended is not waited for.
    for (int left = warps; left > 0;) {
        left = 0;
        for (int warp = 0; warp < warps; warp++) {
            if (lanes[WARP * warp].done) continue;
            bool done;
            do {
                done = advance(warp);
            } while (!done && lanes[WARP * warp].site != BLOCK_BARRIER);
            left += !done;
        }
    }
}

inline void launch(void (*kernel)(const void*), const void* call, unsigned blocks, unsigned threads) {
    body = kernel, argument = call;
    blockDim.x = threads, gridDim.x = blocks;
    if (threads % WARP || threads > MOST) fail("so many threads has no block");
    for (blockIdx.x = 0; blockIdx.x < blocks; blockIdx.x++) run_block(int(threads) / WARP);
}

}  // namespace shim

inline void full(unsigned mask) {
    if (mask != ~0u) shim::fail("a shuffle without all lanes");
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int k) {
    full(mask);
    return shim::exchange(shim::XOR, value, (threadIdx.x & 31) ^ k);
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, int k) {
    full(mask);
    const int lane = threadIdx.x & 31;
    return shim::exchange(shim::DOWN, value, lane + k < shim::WARP ? lane + k : lane);
}

template <class T>
T __shfl_sync(unsigned mask, T value, int from) {
    full(mask);
    return shim::exchange(shim::FROM, value, from);
}

inline void __syncwarp() { shim::wait(shim::WARP_BARRIER); }
inline void __syncthreads() { shim::wait(shim::BLOCK_BARRIER); }

inline void* __cvta_global_to_generic(size_t address) { return reinterpret_cast<void*>(address); }

inline unsigned __float_as_uint(float x) {
    unsigned b;
    std::memcpy(&b, &x, sizeof b);
    return b;
}

inline float __uint_as_float(unsigned b) {
    float x;
    std::memcpy(&x, &b, sizeof x);
    return x;
}

// The sum rounded down: the nearest float, or the one below it where that is above the exact sum.
inline float __fadd_rd(float a, float b) {
    const float near = a + b, part = near - a;
    const float error = (a - (near - part)) + (b - part);  // exact (Knuth's two-sum)
    return error < 0 ? std::nextafterf(near, -INFINITY) : near;
}

inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }

inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
    const unsigned long long both = (unsigned long long)(b) << 32 | a;
    unsigned word = 0;
    for (int i = 0; i < 4; i++) {
        const unsigned n = selector >> (4 * i) & 0xF;
        if (n & 8) shim::fail("byte_perm with a sign");
        word |= unsigned(both >> (8 * n) & 0xFF) << (8 * i);
    }
    return word;
}

// Instead of a kernel: a function that runs it on all blocks.
#define KERNEL(name, minimum, ...)                                                       \
    extern "C" void name(const void* call, unsigned blocks, unsigned threads) {      \
        shim::launch(                                                                \
            [](const void* c) { __VA_ARGS__(*static_cast<const Call*>(c)); }, call,  \
            blocks, threads);                                                        \
    }
