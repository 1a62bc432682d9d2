"""Optimizers that talk less, or that use the time in which others wait."""

from commlib.optim import schedules
from commlib.optim.center import Center
from commlib.optim.dasgd import DASGD, Box, Projected
from commlib.optim.diloco import DiLoCo, LocalSGD
from commlib.optim.downpour import Downpour
from commlib.optim.easgd import EASGD, stable
from commlib.optim.ef21 import EF21
from commlib.optim.elastic import ElasticDiLoCo
from commlib.optim.gathered import Gathered
from commlib.optim.link import Link, local
from commlib.optim.members import Members
from commlib.optim.onebit_adam import OneBitAdam
from commlib.optim.outer import Sync
from commlib.optim.pipeline import Pipeline
from commlib.optim.pprs import GD, PPRS, Nesterov
from commlib.optim.rules import Add, Averaged, Momentum
from commlib.optim.serving import Server, connect
from commlib.optim.shards import Sharded, connect_shards, shards
from commlib.optim.staleness import Staleness, staleness
from commlib.optim.ticks import Schedule
from commlib.optim.tree import Node

__all__ = [
    "DASGD",
    "EASGD",
    "EF21",
    "GD",
    "PPRS",
    "Add",
    "Averaged",
    "Box",
    "Center",
    "DiLoCo",
    "Downpour",
    "ElasticDiLoCo",
    "Gathered",
    "Link",
    "LocalSGD",
    "Members",
    "Momentum",
    "Nesterov",
    "Node",
    "OneBitAdam",
    "Pipeline",
    "Projected",
    "Schedule",
    "Server",
    "Sharded",
    "Staleness",
    "Sync",
    "connect",
    "connect_shards",
    "local",
    "schedules",
    "shards",
    "stable",
    "staleness",
]
