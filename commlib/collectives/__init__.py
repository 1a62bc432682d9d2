"""Collectives: functions of (x, transport, compressor, key), each with its cost beside it.

`ALGORITHMS` has the all-reduces that a scheme may name. The others have one way each.
"""

from . import differences, hierarchical, native, power_sgd, ring, thc, two_phase
from .base import Algorithm, Step, Steps, drive
from .exchange import all_to_all, all_to_all_split, broadcast, raw, raw_reduce_scatter
from .p2p import Mail
from .pool import Pool
from .two_phase import all_gather, reduce_scatter

ALGORITHMS: dict[str, Algorithm] = {
    "native": Algorithm(native.all_reduce, native.wire_bytes, native.seconds),
    "two_phase": Algorithm(two_phase.all_reduce, two_phase.wire_bytes, two_phase.seconds),
    "hierarchical": Algorithm(
        hierarchical.all_reduce, hierarchical.wire_bytes, hierarchical.seconds
    ),
    "ring": Algorithm(ring.all_reduce, ring.wire_bytes, ring.seconds),
    "power_sgd": Algorithm(power_sgd.all_reduce, power_sgd.wire_bytes, power_sgd.seconds),
    "thc": Algorithm(thc.all_reduce, thc.wire_bytes, thc.seconds),
}

__all__ = [
    "ALGORITHMS",
    "Algorithm",
    "Mail",
    "Pool",
    "Step",
    "Steps",
    "all_gather",
    "all_to_all",
    "all_to_all_split",
    "broadcast",
    "differences",
    "drive",
    "raw",
    "raw_reduce_scatter",
    "reduce_scatter",
]
