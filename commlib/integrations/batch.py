"""Batch: point-to-point messages that are issued together, so that NCCL can group them.

On NCCL a send and a receive one after the other on one stream may block each other; grouped they do
not. Messages are coded and posted as always, but into a list, which then goes to
`torch.distributed.batch_isend_irecv` as one.
"""

from __future__ import annotations

import torch

from commlib.traffic import Pending, Post, Through
from commlib.transport import FIRST_TAG, TorchTransport


class Batch(Through):
    """`inner` with sends and receives that wait for `launch`."""

    def __init__(self, inner: TorchTransport) -> None:
        super().__init__(inner)
        self._torch = inner
        self._posts: list[Post] = []
        self._later: list[Later] = []
        self.grouped = False  # whether the library completes them together

    def send(self, x: torch.Tensor, dst: int, tag: int = 0) -> Later:
        return self.add(Post(True, x, dst, FIRST_TAG + tag))

    def recv(self, x: torch.Tensor, src: int | None, tag: int = 0) -> Later:
        assert src is not None, "torch's batches name their peers"
        return self.add(Post(False, x, src, FIRST_TAG + tag))

    def add(self, post: Post) -> Later:
        """One more, with a tag as the library sees it."""
        later = Later(None if post.is_send else post.peer)
        self._posts.append(post)
        self._later.append(later)
        return later

    def launch(self) -> None:
        """Issue all."""
        pending = self._torch.batch(self._posts)
        self.grouped = len(pending) < len(self._later)
        for place, later in enumerate(self._later):
            later.pending = pending if self.grouped else [pending[place]]


class Later:
    """A place in a batch."""

    def __init__(self, source: int | None) -> None:
        self.source = source
        self.pending: list[Pending] = []

    def done(self) -> bool:
        return bool(self.pending) and all(pending.done() for pending in self.pending)

    def wait(self, timeout: float | None = None) -> None:
        for pending in self.pending:
            pending.wait(timeout)

    def poll(self, seconds: float, timeout: float) -> bool:
        self.wait(timeout)
        return True
