"""Tables of values for codes of 1 to 4 bits, ascending; every value is an fp32 number.

gauss1 .. gauss4
    The Lloyd-Max quantizers of the normal distribution: values c and thresholds (c + next) / 2 that
    are each other's best (Max 1960, table I; EDEN, Vargaftik et al. 2022, uses them after a
    rotation). Mean squared errors .36338, .11748, .034548, .009501.
nf4
    NormalFloat of QLoRA (Dettmers et al. 2023, appendix E): quantiles of the normal distribution
    scaled to [-1, 1], with a zero.
e2m1
    4-bit floats with one bit of mantissa, +-0, 0.5, 1, 1.5, 2, 3, 4, 6 (OCP Microscaling Formats
    1.0, section 5.3.3).
e3m0
    4-bit floats with none: +-0 and +-2^-6 to 2^0 (outer gradients of Streaming DiLoCo, Douillard et
    al. 2025, arXiv 2501.18512, section 2.4).
"""

import numpy as np
import numpy.typing as npt

_HALVES = {
    "gauss1": (0.7978845608028654,),
    "gauss2": (0.45278003463649297, 1.5104176084990975),
    "gauss3": (0.24509417894422272, 0.7560052812058808, 1.3439092785050053, 2.1519457045369905),
    "gauss4": (
        0.12839502985114767, 0.3880482994902921, 0.6567591185324665, 0.9423404564869684,
        1.2562311973471838, 1.618046386021887, 2.069017226531391, 2.7325895709951884,
    ),
}  # fmt: skip

_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_E3M0 = (0.0, *(2.0**e for e in range(-6, 1)))


def _fp32(values: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(float(np.float32(v)) for v in values)


def _mirrored(half: tuple[float, ...]) -> tuple[float, ...]:
    return _fp32((*(-v for v in reversed(half)), *half))


TABLES: dict[str, tuple[float, ...]] = {
    **{name: _mirrored(half) for name, half in _HALVES.items()},
    "nf4": _fp32(_NF4),
    "e2m1": _mirrored(_E2M1),
    "e3m0": _mirrored(_E3M0),
}
"""Name -> 2^bits values."""


def thresholds(values: tuple[float, ...]) -> npt.NDArray[np.float32]:
    """The middle between neighbours, in fp32; what lies on one goes to the value nearer to zero."""
    v = np.array(values, np.float32)
    middles: npt.NDArray[np.float32] = (v[:-1] + v[1:]) * np.float32(0.5)
    return middles
