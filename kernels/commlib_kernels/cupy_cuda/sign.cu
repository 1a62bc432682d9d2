// Kernels of sign and natural compression.
#include "ops.cuh"
#include "shared.cuh"
#include "sign.cuh"

KERNELS(sign, Sign)
KERNELS(natural, Natural)
MEASURES(sign, Sign)
KERNEL(shared_scales_sign, 4, shared_scales)
