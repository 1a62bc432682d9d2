"""Codecs: values that turn tensors into bytes. The table below is all of them.

>>> codec("int4:block=64")
Int(bits=4, block=64, round=None)
"""

from collections.abc import Callable, Iterable
from dataclasses import fields
from difflib import get_close_matches
from functools import partial

from commlib.codecs.base import Codec, Round
from commlib.codecs.cast import BF16, FP8, FP16, FP32
from commlib.codecs.sign import Natural, Sign, Ternary
from commlib.codecs.uniform import QSGD, Int

__all__ = ["BF16", "CODECS", "FP8", "FP16", "FP32", "QSGD", "Codec", "Int", "Natural", "Round"]
__all__ += ["Sign", "Ternary", "codec"]

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
}
"""The name in scheme texts -> constructor, one line per codec."""


def codec(text: str) -> Codec:
    """The codec that a text names: ``NAME[:option=value]*``, e.g. ``int4:block=64``.

    Raises:
        ValueError: the name or an option is unknown, or a value is not allowed; says what is.
    """
    name, *given = text.strip().split(":")
    if name not in CODECS:
        raise ValueError(f"codec {name!r} does not exist{_hint(name, CODECS)}")
    make = CODECS[name]
    # The name already says the bits of int8 .. int2.
    allowed = [f.name for f in fields(make()) if f.name != "bits"]
    values: dict[str, object] = {}
    for option in given:
        key, equals, value = option.partition("=")
        if not equals or key not in allowed:
            raise ValueError(f"codec {name!r}: option {option!r} is not known{_hint(key, allowed)}")
        values[key] = int(value) if value.lstrip("-").isdigit() else value
    return make(**values)


def _hint(got: str, allowed: Iterable[str]) -> str:
    close = get_close_matches(got, list(allowed), n=1)
    meant = f"; did you mean {close[0]!r}?" if close else ""
    return f"; allowed: {', '.join(allowed) or 'none'}{meant}"
