"""Memory: the residual that a quantizing kernel adds, and keeps up to date, in the same pass."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Memory:
    """``v = g + alpha h`` is coded; then ``h = (beta - omega alpha) h + omega (v - Q(v))``.

    The second line is DESIGN's ``beta h + omega (g - Q(v))`` with g written as ``v - alpha h``, so
    that the classic case (1, 1, 1) needs neither g nor h again.

    Args:
        residual: flat, fp32, bf16 or int8; places are given by the layout (`Piece.memory`).
        scales: of an int8 residual, bf16 bits as int16, one per block.
        hold: segments whose residual is neither added nor changed (parameters without a gradient).
    """

    residual: torch.Tensor
    scales: torch.Tensor | None = None
    alpha: float = 1.0
    beta: float = 1.0
    omega: float = 1.0
    hold: tuple[int, ...] = ()

    @property
    def carry(self) -> float:
        """``beta - omega alpha``: how much of the old residual stays."""
        return self.beta - self.omega * self.alpha
