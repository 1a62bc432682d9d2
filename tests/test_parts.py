"""all_to_all of unequal parts: what each is coded by, where it lies, how it is counted."""

from __future__ import annotations

import pytest
import torch

from commlib import Communicator
from tests.communicators import data, on_ranks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("small", [1, 7, 333, 1001])
def test_parts_that_stay_raw_lie_beside_coded_ones(small: int, dtype: torch.dtype) -> None:
    """As the tokens of a mixture of experts do: any sizes, in any order."""

    def body(c: Communicator) -> None:
        sizes = [[small, 5000, 0], [5000, small, 3001], [small, 3001, 5000]]  # from, to
        sends, receives = sizes[c.rank], [row[c.rank] for row in sizes]
        x = torch.cat([data(10 * c.rank + r, n).to(dtype) for r, n in enumerate(sends)])
        out = torch.empty(sum(receives), dtype=dtype)
        c.all_to_all(out, x, out_splits=receives, in_splits=sends)
        for r, part in enumerate(out.split(receives)):
            want = data(10 * r + c.rank, len(part)).to(dtype)
            assert part.equal(want) == (len(part) < 1024), (r, len(part))
            assert (part.float() - want.float()).abs().max() < 0.05 if len(part) else True

    on_ranks(3, "int8", body)


def test_parts_follow_the_step_of_the_policy_and_are_counted_by_their_bytes() -> None:
    policy = {"rules": [{"scheme": "fp32", "from_step": 2}, {"scheme": "int8"}]}

    def body(c: Communicator) -> list[bool]:
        exact = []
        for _ in range(4):
            x, out = data(c.rank, 8192), torch.empty(8192)
            c.all_to_all(out, x, out_splits=[4096] * 2, in_splits=[4096] * 2)
            exact.append(bool(out.view(2, -1)[c.rank].equal(x.view(2, -1)[c.rank])))
        rows = c.meter.rows()
        assert [(row["op"], row["key"], row["scheme"]) for row in rows] == [
            ("all_to_all of parts", "(parts)", "by part")
        ]
        assert rows[0]["raw_bytes"] == 4 * 4 * 8192
        assert c.meter.scalars()["commlib/not_compressed"] == 0
        return exact

    assert on_ranks(2, policy, body) == [[False, False, True, True]] * 2
