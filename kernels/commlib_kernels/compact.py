"""The values that travel of a sparse message, as a message of their own."""

from functools import lru_cache
from typing import NamedTuple

from commlib_kernels.formats import Format
from commlib_kernels.layout import Layout, Piece, padded, pieces
from commlib_kernels.sparse import MAX_NUMEL


class Chosen(NamedTuple):
    """A piece of a sparse message, and what travels of it."""

    piece: Piece
    values: Piece  # `x` is an offset in the buffer of all values, back to back
    start: int  # index of the piece's first element within its segment


@lru_cache(maxsize=4096)
def chosen(layout: Layout, fmt: Format, *, owner: bool = False) -> tuple[Chosen, ...]:
    """The pieces that are neither exact nor empty, in wire order.

    Raises:
        ValueError: a piece has 2^32 elements or more.
    """
    assert fmt.sparse is not None
    rows, x = [], 0
    for p in pieces(layout, fmt, owner=owner):
        if p.exact or not p.numel:
            continue
        if p.numel > MAX_NUMEL:
            raise ValueError(
                f"{fmt.sparse.rule}: a piece has {p.numel} elements; at most {MAX_NUMEL} can be "
                "numbered: use more ranks, or cut the tensor"
            )
        count = fmt.sparse.taken(p.numel)
        values = p._replace(x=x, numel=count, code=p.code + fmt.sparse.index_bytes(p.numel))
        rows.append(Chosen(p, values, p.base % padded(layout.sizes[p.segment], fmt)))
        x += count
    return tuple(rows)
