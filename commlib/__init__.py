"""Distributed training in PyTorch that talks less.

The public names, imported on first use: importing commlib itself compiles nothing, queries no
device and starts no thread.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from commlib.integrations import backend as _backend

if TYPE_CHECKING:
    from commlib import checkpoint as checkpoint
    from commlib import distributed as distributed
    from commlib import optim as optim
    from commlib.codecs import codec
    from commlib.communicator import Communicator, exact
    from commlib.integrations.backend import Options
    from commlib.integrations.wrapping import of, wrap
    from commlib.lazy import LazyLoader, LazySampler
    from commlib.policy import Policy, Scheme

__version__ = "0.1.0"

__all__ = ["Communicator", "LazyLoader", "LazySampler", "Options", "Policy", "Scheme"]
__all__ += ["__version__", "codec", "exact", "of", "wrap"]

_MODULES = ("checkpoint", "distributed", "optim")
_HOME = {
    "Communicator": "commlib.communicator",
    "LazyLoader": "commlib.lazy",
    "LazySampler": "commlib.lazy",
    "Options": "commlib.integrations.backend",
    "Policy": "commlib.policy",
    "Scheme": "commlib.policy",
    "codec": "commlib.codecs",
    "exact": "commlib.communicator",
    "of": "commlib.integrations.wrapping",
    "wrap": "commlib.integrations.wrapping",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"commlib.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'commlib' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value  # the next access is a plain lookup
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES})


_backend.register_with_torch()
