"""Tag: which stream of random numbers a message draws from."""

from typing import NamedTuple

import torch


class Tag(NamedTuple):
    """Names a random stream; the element's index within its segment is the position in it.

    seed: of the run, the same on all ranks. keys: one 32-bit number per segment, or one for all.
    step: of the key; on CUDA it may be an int64 scalar on the device, which a captured graph can
    advance. rank: the sender's rank for private streams, -1 for a stream all ranks share.
    """

    seed: int = 0
    keys: tuple[int, ...] = (0,)
    step: int | torch.Tensor = 0
    rank: int = 0

    def key(self, segment: int) -> int:
        """The stream of one segment."""
        return self.keys[segment] if len(self.keys) > 1 else self.keys[0]
