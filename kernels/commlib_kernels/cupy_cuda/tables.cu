// Kernels of tables whose scale is the maximum's (nf4, e2m1, e3m0), and of those that are fitted (eden).
#include "grouped.cuh"
#include "ops.cuh"
#include "tables.cuh"

KERNELS(table, Table)
GROUPED(gauss, Table, true)
