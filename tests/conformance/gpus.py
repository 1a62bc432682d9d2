"""GPUs that are only pretended: the tests that ask for two or more, run with tensors on the CPU.

Most of the suite's tests of DDP put their models on GPUs, though what they test is the reducer, its
hooks and its groups. Here their gates are open, each rank has one GPU, and every tensor meant for
it stays on the CPU. What tests CUDA itself (streams, device numbers) then fails on gloo too and
counts for nothing: the bar asks that what passes on gloo passes on commlib.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

Function = Callable[..., Any]
# Past the limit of a test on busy CPU cores, on gloo too: one compiles, one trains ten models.
TOO_LONG = ("test_ddp_compile_static_graph", "test_ddp_uneven_inputs")


def open_gates(common: Any) -> None:
    """Before the suite's module is imported: its decorators let pass, and mark, what needs GPUs."""
    common.skip_if_no_gpu = _marked
    common.skip_if_lt_x_gpu = lambda count, **options: _marked
    common.init_multigpu_helper = lambda ranks, backend: {rank: [rank] for rank in range(ranks)}


def needed(name: str, test: Function) -> bool:
    """Whether the gates marked the test, and it can be run so."""
    return getattr(test, "needs_gpus", False) and name not in TOO_LONG


def _marked(test: Function) -> Function:
    test.needs_gpus = True
    return test


@contextlib.contextmanager
def pretended(rank: int) -> Iterator[None]:
    """Within it this rank's GPU is the CPU."""
    ddp = nn.parallel.DistributedDataParallel
    with contextlib.ExitStack() as stack:
        for owner, name, instead in (
            (torch.cuda, "set_device", lambda device: None),
            (torch.cuda, "synchronize", lambda device=None: None),
            (torch.cuda, "manual_seed", lambda seed: None),
            (torch.cuda, "current_device", lambda: rank),
            (ddp, "__init__", _without(ddp.__init__, "device_ids", "output_device")),
            (nn.Module, "to", _on_cpu(nn.Module.to)),
        ):
            stack.enter_context(mock.patch.object(owner, name, instead))
        stack.enter_context(_Mode())
        yield


def _without(function: Function, *names: str) -> Function:
    def call(*args: Any, **options: Any) -> Any:
        return function(*args, **{name: x for name, x in options.items() if name not in names})

    return call


def _on_cpu(function: Function) -> Function:
    """`Module.to`, whose first argument may be a device."""

    def call(self: Any, *args: Any, **options: Any) -> Any:
        return function(self, *map(_there, args), **_moved(options))

    return call


def _there(value: Any) -> Any:
    """A device that is a GPU becomes the CPU; where a device may stand, a number is a GPU's."""
    gpu = (
        (isinstance(value, int) and not isinstance(value, bool))
        or (isinstance(value, str) and value.startswith("cuda"))
        or (isinstance(value, torch.device) and value.type == "cuda")
    )
    return "cpu" if gpu else value


def _moved(options: dict[str, Any]) -> dict[str, Any]:
    return {name: _there(x) if name == "device" else x for name, x in options.items()}


class _Mode(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.Tensor.cuda:
            return args[0].clone()  # a GPU's tensor shares nothing with the CPU's
        if func is torch.Tensor.to:
            args = (args[0], *map(_there, args[1:]))
        return func(*args, **_moved(kwargs or {}))
