"""Optimizers that talk less, or that use the time in which others wait."""

from commlib.optim.pipeline import Pipeline
from commlib.optim.pprs import GD, PPRS, Nesterov
from commlib.optim.ticks import Schedule

__all__ = ["GD", "PPRS", "Nesterov", "Pipeline", "Schedule"]
