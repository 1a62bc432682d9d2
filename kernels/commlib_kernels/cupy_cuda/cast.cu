// Kernels of fp16, bf16 and fp8.
#include "cast.cuh"
#include "ops.cuh"

KERNELS(fp16, 4, Cast<FP16>)
KERNELS(bf16, 5, Cast<BF16>)
KERNELS(fp8, 4, Fp8)
