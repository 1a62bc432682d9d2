// Kernels of rotated blocks; tables.cu has that of gauss, rotated or not.
#include "cast.cuh"
#include "grouped.cuh"
#include "sign.cuh"
#include "tables.cuh"
#include "uniform.cuh"

GROUPED(rotated_uniform, Uniform<0>)
GROUPED(rotated_fp8, Fp8)
GROUPED(rotated_sign, Sign)
GROUPED(rotated_table, Table)
