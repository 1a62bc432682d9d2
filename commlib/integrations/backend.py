"""The backend "commlib" of torch.distributed: its name, its options, its registration.

    torch.distributed.init_process_group("commlib")        # no other line of the script changes
    dist.init_process_group("commlib", pg_options=commlib.Options("int8"))

An installed commlib is known to torch from `import torch` on, by the entry point `torch.backends`;
otherwise `import commlib` makes it known, before or after torch. Importing this module imports
neither torch nor the rest of commlib: that waits for the first group (`process_group`).
"""

from __future__ import annotations

import importlib.util
import logging
import sys
from dataclasses import dataclass
from datetime import timedelta
from importlib.abc import MetaPathFinder
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from importlib.machinery import ModuleSpec

    import torch.distributed as dist

    from commlib.integrations.groups import Source

NAME = "commlib"
DEVICES = ("cpu", "cuda")
TORCH = "torch.distributed"


@dataclass(frozen=True)
class Options:
    """What `pg_options` of a commlib group may say; a policy alone will do as well.

    A group that is made without takes those of the default group, if that is a commlib group.

    Args:
        policy: scheme text, `Policy`, table, path of a policy file, or "auto": measure the group
            and compress where it is faster; None: COMMLIB_POLICY, else "auto".
        seed: of the random streams, the same on all ranks.
        inner: the backend that moves the bytes, as torch.distributed names it ("gloo", "nccl",
            "cpu:gloo,cuda:nccl", ...); "auto": gloo, and NCCL for CUDA tensors where there is one.
        timeout: of the group, seconds or a timedelta; None: what torch says.

    Raises: ValueError: a policy, seed or timeout that cannot be.
    """

    policy: Source | None = None
    seed: int = 0
    inner: str = "auto"
    timeout: float | timedelta | None = None

    def __post_init__(self) -> None:
        if self.policy is not None and self.policy != "auto":
            from commlib.policy import Policy

            Policy.parse(self.policy)
        if not isinstance(self.seed, int) or isinstance(self.seed, bool) or self.seed < 0:
            raise ValueError(f"seed is {self.seed!r}, it must be a whole number >= 0")
        if self.timeout is not None and not isinstance(self.timeout, timedelta):
            from commlib.engine import check_settings

            check_settings(None, self.timeout)
        if self._timeout is not None and self._timeout <= timedelta(0):
            raise ValueError(f"timeout is {self.timeout!r}, it must be positive")

    @property
    def _timeout(self) -> timedelta | None:
        """The timeout under the name by which DeviceMesh asks for it."""
        if self.timeout is None or isinstance(self.timeout, timedelta):
            return self.timeout
        return timedelta(seconds=self.timeout)


def register() -> None:
    """Make the backend known to torch.distributed; harmless when it is already."""
    import torch.distributed as dist

    if dist.is_available() and NAME.upper() not in dist.Backend._plugins:
        dist.Backend.register_backend(NAME, create, extended_api=True, devices=list(DEVICES))


def create(facts: Any, options: Any) -> dist.ProcessGroup:
    """The group that torch asks for; `facts`: its `_DistributedBackendOptions`."""
    from commlib.integrations.process_group import ProcessGroup

    return ProcessGroup(facts, options)


def autoload() -> None:
    """What torch calls at the end of its own import; never the reason why that fails."""
    try:
        register()
    except Exception:
        logging.getLogger("commlib").warning(
            "the backend commlib is not registered with torch.distributed", exc_info=True
        )


def register_with_torch() -> None:
    """`register`, now or once somebody has imported torch.distributed."""
    if hasattr(sys.modules.get(TORCH), "Backend"):
        autoload()
    elif TORCH not in sys.modules:
        sys.meta_path.insert(0, _AfterTorch())


class _AfterTorch(MetaPathFinder):
    """Lets the import of torch.distributed run as it would, and registers at its end."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if name != TORCH:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def load_and_register(module: Any) -> None:
                load(module)
                autoload()

            spec.loader.exec_module = load_and_register  # type: ignore[method-assign]
        return spec
