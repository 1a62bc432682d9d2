"""Optimizers that talk less, or that use the time in which others wait."""

from commlib.optim.diloco import DiLoCo, LocalSGD
from commlib.optim.ef21 import EF21
from commlib.optim.elastic import ElasticDiLoCo
from commlib.optim.members import Members
from commlib.optim.onebit_adam import OneBitAdam
from commlib.optim.outer import Sync
from commlib.optim.pipeline import Pipeline
from commlib.optim.pprs import GD, PPRS, Nesterov
from commlib.optim.ticks import Schedule

__all__ = [
    "EF21",
    "GD",
    "PPRS",
    "DiLoCo",
    "ElasticDiLoCo",
    "LocalSGD",
    "Members",
    "Nesterov",
    "OneBitAdam",
    "Pipeline",
    "Schedule",
    "Sync",
]
