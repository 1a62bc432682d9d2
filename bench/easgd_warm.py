"""For the fork server of `bench/easgd_processes.py` alone: what it imports and loads before it
forks, so that a process is there at once."""

import torch

import bench.easgd_ranks  # noqa: F401
from bench.easgd import named
from bench.problems import Digits
from commlib.optim import Center, local

torch.set_num_threads(1)
_problem = Digits((0,))
for _push in ("int4", "int2"):
    _link = local(Center(named(_problem), push=_push), named(_problem), "w")
    _link.push(torch.ones_like(_link.copy))
    _link.pull()
