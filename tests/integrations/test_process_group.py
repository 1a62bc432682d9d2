"""The backend commlib under everything of torch that takes a process group."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from commlib.integrations.fsdp_comms import Replicas
from commlib.integrations.process_group import ProcessGroup
from tests.integrations import backend_cases as cases
from tests.integrations import backend_models as models
from tests.processes import Pool

pytestmark = pytest.mark.processes


def under(options: Any, *functions: Callable[[], None]) -> None:
    """Run on this rank, all in one default group of the backend."""
    with cases.world(options):
        assert dist.get_backend() == "commlib"
        for function in functions:
            function()


def each(*functions: Callable[[], None]) -> None:
    """Run on this rank, in the gloo group that the pool made."""
    for function in functions:
        function()


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_operations_and_dtypes(pool: Pool, ranks: int) -> None:
    pool.run(under, "int8", cases.operations_and_dtypes, ranks=ranks)


def test_fp32_is_bitwise_gloos(pool: Pool) -> None:
    pool.run(under, "fp32", cases.operations_and_dtypes, ranks=2)


def test_moves_under_int8(pool: Pool) -> None:
    pool.run(
        under,
        "int8",
        cases.parameters_travel_raw,
        cases.activations_are_compressed,
        cases.what_is_not_compressed_is_passed_on,
        cases.works_are_torchs,
        ranks=3,
    )


def test_parameters_by_a_rule_of_their_own(pool: Pool) -> None:
    pool.run(under, cases.PARAMETERS, cases.named_parameters_are_compressed, ranks=2)


def test_torch_on_top(pool: Pool) -> None:
    pool.run(
        under,
        "int8",
        models.functional_collectives,
        models.dtensors,
        models.tensor_parallel,
        models.checkpoints,
        models.ddp_wrapped_as_well,
        models.ddp_in_a_compiled_step,
        ranks=3,
    )


def test_fsdp_and_hsdp(pool: Pool) -> None:
    pool.run(under, "int8", models.fsdp, ranks=4)


def test_groups_of_a_gloo_world(pool: Pool) -> None:
    pool.run(each, models.groups_of_ranks, models.devices_of_other_backends, models.meshes, ranks=4)


def test_policy_of_a_new_group(pool: Pool) -> None:
    pool.run(under, None, models.policy_is_found_and_changed, ranks=3)


def test_without_a_policy(pool: Pool) -> None:
    pool.run(under, None, models.auto_measures_once_and_is_right, ranks=2)


def test_ddp_and_a_world_made_again(pool: Pool) -> None:
    pool.run(each, models.ddp_has_gloos_gradients, models.once_more, ranks=3)


def test_failures(pool: Pool) -> None:
    pool.run(under, "int8", cases.failures, ranks=2)


@pytest.mark.parametrize("group", [ProcessGroup, Replicas])
def test_no_call_is_left_to_torch_with_the_gil_held(group: type) -> None:
    """c10d looks for a Python override of these and then makes the call itself, still holding the
    GIL. gloo's thread frees a call's tensors, for which it needs the GIL, with the queue of calls
    locked: the two then wait for each other for ever (seen once in some hundred runs)."""
    headers = Path(torch.__file__).parent / "include" / "torch" / "csrc" / "distributed" / "c10d"
    source = (headers / "PyProcessGroup.hpp").read_text()
    group_part = source[source.index("using ProcessGroup::ProcessGroup") :]
    calls = re.findall(r"Work> (\w+)\(", group_part)
    assert {"allreduce", "barrier", "send", "recv"} <= {*calls}
    assert [name for name in calls if name not in vars(group)] == []
