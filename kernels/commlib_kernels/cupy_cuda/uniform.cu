// Kernels of int8 .. int2, ternary and QSGD; the widths that people use most know their bits.
#include "ops.cuh"
#include "shared.cuh"
#include "uniform.cuh"

KERNELS(uniform8, Uniform<8>)
KERNELS(uniform4, Uniform<4>)
KERNELS(uniform, Uniform<0>)
MEASURES(uniform, Uniform<0>)
KERNEL(shared_scales_uniform, 4, shared_scales)
