"""How functions are compiled here: what is inlined, what is cached, and where.

Scalar functions are inlined at Numba's level, so that the loops around them vectorise. Loops over
one block are functions of their own: inlined into a kernel they compile a hundred times slower, and
no longer vectorise. Indices are unsigned (`uintp`): a signed one gets a wrap-around test that stops
vectorisation as well.
"""

import hashlib
import threading
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import FunctionType
from typing import Any

import numba
import numpy as np
from numba import types
from numba.core import config as _config
from numba.extending import intrinsic
from numba.np import arrayobj

from commlib_kernels import scalar
from commlib_kernels.cache import folder

Function = Callable[..., Any]

_njit: Any = numba.njit  # whose types do not know _nrt
settings: Any = _config

OPTIONS: dict[str, Any] = {
    "nogil": True,
    "error_model": "numpy",
    "boundscheck": False,
    "_nrt": False,
}
"""Without Numba's reference counting: kernels allocate nothing, and counting (atomically) what
they are lent cost more than half of the time of a strip."""

inlined: Function = _njit(inline="always", **OPTIONS)
loop: Function = _njit(**OPTIONS)


@inlined
def _mul(a, b):
    return a * b  # Numba contracts nothing on CPUs without fastmath


@inlined
def _add(a, b):
    return a + b


@inlined
def bits(x):
    """The pattern of an fp32 value."""
    return np.float32(x).view(np.uint32)


@inlined
def floats(b):
    """The fp32 value of a pattern."""
    return np.uint32(b).view(np.float32)


@inlined
def _rint(x):
    return np.uint32(np.int32(np.rint(x)))


@inlined
def _floor(x):
    return np.uint32(np.int32(np.floor(x)))


@intrinsic
def at(typing: Any, address: Any, kind: Any) -> Any:
    """The array of `kind` that starts at an address (int64); its length is never looked at."""
    del typing
    array = types.Array(kind.dtype, 1, "C")

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        made = context.make_array(array)(context, builder)
        element = context.get_data_type(array.dtype)
        itemsize = context.get_constant(types.intp, context.get_abi_sizeof(element))
        arrayobj.populate_array(
            made,
            data=builder.inttoptr(args[0], element.as_pointer()),
            shape=[context.get_constant(types.intp, 1 << 60)],
            strides=[itemsize],
            itemsize=itemsize,
            meminfo=None,
        )
        return made._getvalue()

    return array(address, kind), codegen


SCALARS = scalar.make(inlined, _mul, _add, bits, floats, _rint, _floor)


@cache
def cache_dir() -> Path:
    """The folder of compiled kernels: one per version of the sources, of Numba and the processor.

    Numba itself does not notice changes in inlined functions.
    """
    sources = sorted(Path(__file__).parent.parent.rglob("*.py"))
    digest = hashlib.sha256(numba.__version__.encode())
    for path in sources:
        digest.update(path.read_bytes())
    return folder(f"numba-{digest.hexdigest()[:16]}")


def specialise(
    template: Function, name: str, bound: dict[str, Any], decorator: Function = loop
) -> Function:
    """Compile `template` with some of its global names bound.

    Numba can keep neither closures nor functions passed as arguments in its cache; a copy of the
    function with other globals and a name of its own it can.

    Args:
        decorator: `loop`, `inlined`, or `entry` for what Python calls.
    """
    assert isinstance(template, FunctionType)
    copy = FunctionType(template.__code__, {**template.__globals__, **bound}, name)
    copy.__qualname__ = f"{template.__name__}_{name}"
    copy.__module__ = template.__module__
    return decorator(copy)


_entering = threading.Lock()


def entry(function: Function) -> Function:
    """Compile what Python calls, and keep it in the cache.

    One at a time: threads would swap Numba's cache folder, which others use too, under each other.
    """
    with _entering:
        before = settings.CACHE_DIR
        settings.CACHE_DIR = str(cache_dir())
        try:
            return _njit(cache=True, **OPTIONS)(function)
        finally:
            settings.CACHE_DIR = before
