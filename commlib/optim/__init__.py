"""Optimizers that talk less, or that use the time in which others wait."""

from commlib.optim.center import Center
from commlib.optim.downpour import Downpour
from commlib.optim.easgd import EASGD, stable
from commlib.optim.ef21 import EF21
from commlib.optim.gathered import Gathered
from commlib.optim.link import Link, local
from commlib.optim.onebit_adam import OneBitAdam
from commlib.optim.pipeline import Pipeline
from commlib.optim.pprs import GD, PPRS, Nesterov
from commlib.optim.rules import Add, Averaged, Momentum
from commlib.optim.serving import Server, connect
from commlib.optim.shards import Sharded, connect_shards, shards
from commlib.optim.ticks import Schedule
from commlib.optim.tree import Node

__all__ = [
    "EASGD",
    "EF21",
    "GD",
    "PPRS",
    "Add",
    "Averaged",
    "Center",
    "Downpour",
    "Gathered",
    "Link",
    "Momentum",
    "Nesterov",
    "Node",
    "OneBitAdam",
    "Pipeline",
    "Schedule",
    "Server",
    "Sharded",
    "connect",
    "connect_shards",
    "local",
    "shards",
    "stable",
]
