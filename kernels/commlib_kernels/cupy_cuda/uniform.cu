// Kernels of int8 .. int2, ternary and QSGD; the widths that people use most know their bits.
#include "ops.cuh"
#include "shared.cuh"
#include "uniform.cuh"

KERNELS(uniform8, 5, Uniform<8>)
KERNELS(uniform4, 5, Uniform<4>)
KERNELS(uniform, 4, Uniform<0>)
MEASURES(uniform, Uniform<0>)
KERNEL(shared_scales_uniform, 5, shared_scales)
