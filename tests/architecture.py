"""The rules of the house, as a checker over source text.

A module may import modules of its own floor and of the floors below it, never of a floor above, and
no ring of modules may import one another while they load. `commlib_kernels` is floor 0 and knows
nothing of commlib. Below floor 5 only `transport.py` touches torch.distributed: all traffic and all
byte counts go through it.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from typing import NamedTuple

FLOORS = {
    "commlib_kernels": 0,
    "commlib.codecs": 1,
    "commlib.topology": 1,
    "commlib.aside": 2,
    "commlib.asking": 2,
    "commlib.boundary": 2,
    "commlib.copies": 2,
    "commlib.counters": 2,
    "commlib.eager": 2,
    "commlib.feedback": 2,
    "commlib.hosts": 2,
    "commlib.lane": 2,
    "commlib.modes": 2,
    "commlib.order": 2,
    "commlib.pending": 2,
    "commlib.policy": 2,
    "commlib.references": 2,
    "commlib.algorithms": 2,
    "commlib.scheme": 2,
    "commlib.stamp": 2,
    "commlib.threads": 2,
    "commlib.traffic": 2,
    "commlib.transport": 2,
    "commlib.collectives": 3,
    "commlib.agreement": 4,
    "commlib.capture": 4,
    "commlib.carrier": 4,
    "commlib.checked": 4,
    "commlib.communicator": 4,
    "commlib.compressors": 4,
    "commlib.engine": 4,
    "commlib.planner": 4,
    "commlib.planning": 4,
    "commlib.plans": 4,
    "commlib.reshard": 4,
    "commlib.runner": 4,
    "commlib.sampling": 4,
    "commlib.streams": 4,
    "commlib.telemetry": 4,
    "commlib.waiters": 4,
    "commlib.work": 4,
    "commlib.worker": 4,
    "commlib.checkpoint": 5,
    "commlib.distributed": 5,
    "commlib.integrations": 5,
    "commlib.lazy": 5,
    "commlib.optim": 5,
    "commlib": 5,  # the public names reach up to the integrations
    "commlib.__main__": 6,
    "commlib.benchmark": 6,
    "commlib.cli": 6,
    "commlib.demo": 6,
    "commlib.doctor": 6,
    "commlib.emulation": 6,
}
NETWORK = "torch.distributed"
NETWORK_MODULE = "commlib.transport"
NETWORK_FLOOR = 5


class Import(NamedTuple):
    name: str  # the dotted name asked for; may end in a function or class
    line: int
    at_load: bool  # runs when the module loads: not inside a function or `if TYPE_CHECKING`


def floor_of(module: str) -> int | None:
    """The floor of a module or of the package that holds it; None where the table has no line."""
    if module == "commlib":
        return FLOORS["commlib"]
    for end in range(len(module.split(".")), 0, -1):
        prefix = ".".join(module.split(".")[:end])
        if prefix in FLOORS and prefix != "commlib":
            return FLOORS[prefix]
    return None


def imports(source: str, module: str, *, is_package: bool = False) -> Iterator[Import]:
    """Every import in `source`, relative ones made absolute, and every `torch.distributed` used."""
    package = module if is_package else module.rpartition(".")[0]

    def walk(node: ast.AST, at_load: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, at_load)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = package.split(".")
                base = ".".join([*parts[: len(parts) - node.level + 1], *base.split(".")]).strip(
                    "."
                )
            for alias in node.names:
                yield Import(f"{base}.{alias.name}", node.lineno, at_load)
        elif isinstance(node, ast.Attribute) and ast.unparse(node) == NETWORK:
            yield Import(NETWORK, node.lineno, at_load)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for statement in node.body:
                yield from walk(statement, False)
            for statement in node.orelse:
                yield from walk(statement, at_load)
            return
        function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        deeper = at_load and not function
        for child in ast.iter_child_nodes(node):
            yield from walk(child, deeper)

    yield from walk(ast.parse(source), True)


def violations(sources: Mapping[str, str], packages: frozenset[str] = frozenset()) -> list[str]:
    """What breaks the rules in `sources` (module name -> text), one line each; `packages` are the
    modules that are a package's `__init__.py`."""
    found: list[str] = []
    loads: dict[str, set[str]] = {}
    for module, source in sorted(sources.items()):
        floor = floor_of(module)
        if floor is None:
            found.append(f"{module}: has no floor; give it one in tests/architecture.py")
            continue
        loads[module] = set()
        for name, line, at_load in imports(source, module, is_package=module in packages):
            where = f"{module}:{line}"
            if f"{name}.".startswith(f"{NETWORK}."):
                if floor < NETWORK_FLOOR and module != NETWORK_MODULE:
                    found.append(f"{where}: {NETWORK} below floor {NETWORK_FLOOR}")
                continue
            if name.split(".")[0] not in {"commlib", "commlib_kernels"}:
                continue
            target = _module(name, sources)
            target_floor = floor_of(target)
            if target_floor is None:
                continue  # reported where it stands
            if target_floor > floor:
                found.append(f"{where}: floor {floor} imports {target} of floor {target_floor}")
            elif at_load and target != module:
                loads[module].add(target)
    try:
        TopologicalSorter(loads).prepare()
    except CycleError as error:
        found.append("ring of imports: " + " -> ".join(reversed(error.args[1])))
    return found


def _module(name: str, sources: Mapping[str, str]) -> str:
    """The module that the dotted `name` reaches into: the longest prefix that is one."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        prefix = ".".join(parts[:end])
        if prefix in sources or prefix in FLOORS:
            return prefix
    return name
