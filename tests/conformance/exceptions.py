"""The tests that pass on gloo and not on commlib, each with its reason; at most 15 of a part."""

from __future__ import annotations

BY_NAME = "torch.distributed.monitored_barrier refuses every backend that is not named gloo"
EXCEPTIONS: dict[str, dict[str, str]] = {
    "suite": {
        "test_monitored_barrier_failure_order": BY_NAME,
        "test_monitored_barrier_gloo": BY_NAME,
        "test_monitored_barrier_gloo_subgroup": BY_NAME,
        "test_monitored_barrier_wait_all_ranks": BY_NAME,
    },
    "gpus": {},
}
