"""Codecs: values that turn tensors into bytes. The tables below are all of them.

>>> codec("int4:block=64")
Int(bits=4, block=64, round=None)
>>> codec("rotate|eden2")
Rotated(inner=Eden(bits=2, block=1024, scale='fit'), seed=0)
>>> codec("int4|entropy")
Entropy(inner=Int(bits=4, block=128, round=None))
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from difflib import get_close_matches
from functools import partial

from commlib.codecs.base import Codec, Round
from commlib.codecs.buckets import Sigma8
from commlib.codecs.cast import BF16, FP8, FP16, FP32
from commlib.codecs.codebook import E2M1, E3M0, NF4, Eden
from commlib.codecs.entropy import Entropy
from commlib.codecs.grid import Grid
from commlib.codecs.microscaling import MXFP4, MXFP8
from commlib.codecs.rotation import Rotated
from commlib.codecs.sign import Natural, Sign, Ternary
from commlib.codecs.sparse import RandK, TopK
from commlib.codecs.uniform import QSGD, Int

__all__ = [
    "BF16",
    "CODECS",
    "E2M1",
    "E3M0",
    "FP8",
    "FP16",
    "FP32",
    "MXFP4",
    "MXFP8",
    "NF4",
    "QSGD",
    "STAGES",
    "Codec",
    "Eden",
]
__all__ += [
    "BEHIND",
    "Entropy",
    "Grid",
    "Int",
    "Natural",
    "RandK",
    "Rotated",
    "Round",
    "Sigma8",
    "Sign",
    "Ternary",
    "TopK",
    "codec",
]

CODECS: dict[str, Callable[..., Codec]] = {
    "fp32": FP32,
    "fp16": FP16,
    "bf16": BF16,
    "fp8": FP8,
    **{f"int{bits}": partial(Int, bits) for bits in range(8, 1, -1)},
    "sign": Sign,
    "ternary": Ternary,
    "qsgd": QSGD,
    "natural": Natural,
    **{f"eden{bits}": partial(Eden, bits) for bits in range(4, 0, -1)},
    "nf4": NF4,
    "e2m1": E2M1,
    "e3m0": E3M0,
    "mxfp8": MXFP8,
    "mxfp4": MXFP4,
    **{f"grid{bits}": partial(Grid, bits) for bits in range(6, 1, -1)},
    "sigma8": Sigma8,
}
"""The name in scheme texts -> constructor, one line per codec."""

STAGES: dict[str, Callable[..., Codec]] = {
    "rotate": Rotated,
    "topk": TopK,
    "randk": RandK,
}
"""What stands before a ``|``: it takes the codec behind it as its argument."""

BEHIND: dict[str, Callable[..., Codec]] = {"entropy": Entropy}
"""What stands last, behind a ``|``: it takes all before it."""


def codec(text: str) -> Codec:
    """The codec that a text names: ``{STAGE|}NAME[:option=value]*{|STAGE}``, as ``int4:block=64``.

    Raises:
        ValueError: the name or an option is unknown, or a value is not allowed; says what is.
    """
    if not isinstance(text, str):
        raise ValueError(f"a codec is named by text such as 'int4:block=64', got {text!r}")
    before, bar, last = text.strip().rpartition("|")
    begins = before.partition("|")[0].split(":")[0].strip()
    if bar and (last.strip().split(":")[0] in BEHIND or begins in CODECS):
        inner = codec(before)
        return _made(last, {name: partial(make, inner) for name, make in BEHIND.items()}, "stage")
    front, bar, behind = text.strip().partition("|")
    if bar and front.strip() in BEHIND:
        raise ValueError(f"stage {front.strip()!r} stands last: write {behind}|{front.strip()}")
    if not bar and (name := front.partition(":")[0]) in STAGES:
        raise ValueError(f"{name} stands before a codec: write for example {front}|int8")
    if not bar:
        return _made(front, CODECS, "codec")
    inner = codec(behind)
    return _made(front, {name: partial(make, inner) for name, make in STAGES.items()}, "stage")


def _made(text: str, table: Mapping[str, Callable[..., Codec]], what: str) -> Codec:
    name, *given = text.strip().split(":")
    if name not in table:
        raise ValueError(f"{what} {name!r} does not exist{_hint(name, table)}")
    # The name already says the bits of int8 .. int2, and the inner codec stands behind the bar.
    allowed = [f.name for f in fields(table[name]()) if f.name not in ("bits", "inner")]
    values: dict[str, object] = {}
    for option in given:
        key, equals, value = option.partition("=")
        if not equals or key not in allowed:
            raise ValueError(
                f"{what} {name!r}: option {option!r} is not known{_hint(key, allowed)}"
            )
        if key in values:
            raise ValueError(f"{what} {name!r}: option {key!r} is given twice")
        values[key] = _value(value)
    return table[name](**values)


def _value(text: str) -> int | float | str:
    if re.fullmatch(r"-?[0-9]+", text):
        return int(text)
    return float(text) if re.fullmatch(r"-?[0-9]*\.?[0-9]+(e-?[0-9]+)?", text) else text


def _hint(got: str, allowed: Iterable[str]) -> str:
    close = get_close_matches(got, list(allowed), n=1)
    meant = f"; did you mean {close[0]!r}?" if close else ""
    return f"; allowed: {', '.join(allowed) or 'none'}{meant}"
