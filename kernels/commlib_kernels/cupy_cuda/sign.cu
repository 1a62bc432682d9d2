// Kernels of sign and natural compression.
#include "ops.cuh"
#include "shared.cuh"
#include "sign.cuh"

KERNELS(sign, 4, Sign)
KERNELS(natural, 4, Natural)
MEASURES(sign, Sign)
KERNEL(shared_scales_sign, 5, shared_scales)
