"""EASGD Tree: centres that are workers of other centres.

    root        Center
    inner       Node: a centre for its children, a worker of its parent
    leaves      EASGD around an optimizer

Every edge is an elastic exchange, asynchronous and coded as any other. A leaf exchanges every
`EASGD.period` steps, a node with its parent after every `period` exchanges of its children, so the
traffic of a node is that of its own children, and a little upward, whatever the number of leaves.

Source: Zhang, thesis, arXiv 1605.02216, chapter 6 (EASGD Tree).
"""

from __future__ import annotations

import threading

from commlib.optim.center import Center, check_sizes
from commlib.optim.easgd import check_conserves
from commlib.optim.link import End, check_takes
from commlib.optim.ticks import check_count


def moving_rate(degree: int) -> float:
    """The thesis' rate of every edge of a tree: ``0.9 / (degree + 1)``."""
    check_count("EASGD tree: degree", degree)
    return 0.9 / (degree + 1)


class Node:
    """Ties a centre to its parent.

        center = Center(params)
        node = Node(center, connect(store, params, "node2", name="root"), moving_rate(4), period=40)
        Server(center, store, name="node2").start()

    The exchange is made in the thread of the child whose push was the last of the period. Children
    come before parents in every lock, so trees cannot block.

    Args:
        center: of the children; its values are this node's.
        parent: link to the centre above.
        rate: of the exchange with it (alpha).
        period: updates by children from one exchange to the next.

    Raises: ValueError: a rate outside 0 to 1, a period below 1, a parent of other parameters or
        another order, or whose rule does not add updates as they come.
    """

    def __init__(self, center: Center, parent: End, rate: float, period: int) -> None:
        check_count("Node: period", period)
        if not 0 <= rate <= 1:
            raise ValueError(f"Node: rate is {rate}, allowed: 0 to 1")
        check_takes("Node", "updates", parent)
        check_conserves("Node", parent)
        check_sizes("Node", center.shape.sizes, parent.sizes)
        self.center, self.parent, self.rate, self.period = center, parent, rate, period
        self._lock = threading.Lock()
        center.after = self._pushed

    def exchange(self) -> None:
        """One elastic exchange with the parent. RuntimeError: it is gone."""
        with self._lock:
            above = self.parent.pull()
            with self.center.lock:
                update = (self.center.values - above).mul_(self.rate)
            # children go on meanwhile: a parent that stalls keeps none of them waiting
            moved = self.parent.push(update)
            with self.center.lock:
                self.center.values -= moved

    def _pushed(self, version: int) -> None:
        if version % self.period == 0:
            self.exchange()
