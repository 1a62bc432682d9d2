"""Where kernels run: on a GPU, or in Numba's CUDA simulator (NUMBA_ENABLE_CUDASIM=1).

All other modules take the names of `gpu.py` and `simulated.py` from here.
"""

from importlib import import_module
from typing import Any

import numpy as np
from numba.cuda import config

from commlib_kernels import scalar

SIMULATED = bool(config.ENABLE_CUDASIM)

_target: Any = import_module(f"commlib_kernels.numba_cuda.{'simulated' if SIMULATED else 'gpu'}")

THREADS, BLOCKS = _target.THREADS, _target.BLOCKS
device, kernel = _target.device, _target.kernel
unit_of_floats, unit_of_words = _target.unit_of_floats, _target.unit_of_words
load8, load16, load32, load64 = _target.load8, _target.load16, _target.load32, _target.load64
load32x2, load32x4, load_f64 = _target.load32x2, _target.load32x4, _target.load_f64
store8, store16, store32 = _target.store8, _target.store16, _target.store32
store32x2, store32x4, store_f64 = _target.store32x2, _target.store32x4, _target.store_f64
bits, floats, bytes4 = _target.bits, _target.floats, _target.bytes4
mul, add, square_f64, add_f64 = _target.mul, _target.add, _target.square_f64, _target.add_f64
clamp, rint_bits, floor_bits = _target.clamp, _target.rint_bits, _target.floor_bits
fp16_value, fp16_nearest = _target.fp16_value, _target.fp16_nearest
lane, warp, warps = _target.lane, _target.warp, _target.warps
thread, block, blocks = _target.thread, _target.block, _target.blocks
warp_max, warp_sum = _target.warp_max, _target.warp_sum
exchange, exchange4, exponent = _target.exchange, _target.exchange4, _target.exponent
shared_floats = _target.shared_floats
sync_warp, sync_block = _target.sync_warp, _target.sync_block


@device
def _rint(y):
    return rint_bits(y) & np.uint32(0x3FFFFF)


@device
def _floor(y):
    return floor_bits(y) & np.uint32(0x3FFFFF)


SCALARS = scalar.make(device, mul, add, bits, floats, _rint, _floor)
