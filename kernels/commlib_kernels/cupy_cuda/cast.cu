// Kernels of fp16, bf16 and fp8.
#include "cast.cuh"
#include "ops.cuh"

KERNELS(fp16, Cast<FP16>)
KERNELS(bf16, Cast<BF16>)
KERNELS(fp8, Fp8)
