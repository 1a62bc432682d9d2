// Kernels of tensors that travel as they are: every piece is exact.
#include "ops.cuh"

template <void OP(const Call&, const Piece&, i64)>
__device__ __forceinline__ void exact(const Call& call) {
    const i64 tile = warp_id();
    if (tile < call.tiles) OP(call, piece_of(call, tile), tile);
}

KERNEL(quantize_raw, 4, exact<quantize_exact>)
KERNEL(dequantize_raw, 4, exact<dequantize_exact>)
KERNEL(reduce_raw, 4, exact<reduce_exact>)
