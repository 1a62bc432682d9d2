"""`commlib.wrap` and `commlib.of`, for whatever commlib can attach to."""

from __future__ import annotations

from typing import Any, TypeVar

from torch import nn

from commlib.engine import check_settings
from commlib.integrations import ddp, fsdp
from commlib.integrations.ddp import DDPState
from commlib.integrations.fsdp import FSDPState
from commlib.integrations.fsdp_refusals import is_fsdp
from commlib.integrations.pipeline import Pipeline
from commlib.integrations.pipeline_hooks import attach, attach_schedule
from commlib.integrations.pipeline_policy import PolicyLike, facts_of, parse

Thing = TypeVar("Thing")


def wrap(
    model: Thing,
    policy: PolicyLike | None = None,
    *,
    backward: PolicyLike | None = None,
    parameters: PolicyLike | None = None,
    seed: int | None = None,
    timeout: float | None = None,
) -> Thing:
    """Compress what a model sends; returns the same object.

    model: a `DistributedDataParallel` (its gradients: `integrations.ddp.wrap`), a model sharded by
    `fully_shard` (its gradients: `integrations.fsdp.wrap`), or a schedule or stage of
    torch.distributed.pipelining (activations and their gradients: `wrap_pipeline`). Every rank
    calls it with the same arguments.

    Args:
        policy: scheme text, `Policy`, table or path of a policy file; None: COMMLIB_POLICY, else
            "int8+ef" for gradients and "int8" for pipelines.
        backward: of a pipeline, for the gradients of activations; None: as `policy`.
        parameters: of an FSDP2 model, for gathered parameters ("int8", "int4+delta"); None: raw.
        seed: of the random streams; None: what it was, at first 0.
        timeout: seconds a collective or an agreement may take; None: the group's.

    Raises: ValueError: something else, or used in a way that leaves no room for compression.
    """
    if isinstance(model, nn.Module):
        if backward is not None:
            raise ValueError(
                f"backward={backward!r} is for pipelines, whose messages have two directions; a "
                "module sends gradients only"
            )
        if is_fsdp(model):
            return fsdp.wrap(model, policy, parameters=parameters, seed=seed, timeout=timeout)
        _no_parameters(parameters, "other modules are not gathered")
        return ddp.wrap(model, policy, seed=seed, timeout=timeout)
    _no_parameters(parameters, "a pipeline gathers none: wrap the stage's module too")
    wrap_pipeline(model, policy, backward=backward, seed=seed, timeout=timeout)
    return model


def of(model: Any) -> Any:
    """The state of a wrapped model (`DDPState`, `FSDPState`) or pipeline (`Pipeline`).

    It goes into checkpoints beside the model: `torch.save(of(model).state_dict(), f"{rank}.pt")`,
    or with torch.distributed.checkpoint as it is, `dcp.save({"commlib": of(model), ..})`. Resuming
    on another number of ranks: `commlib.checkpoint`.

    Raises: ValueError: it is not wrapped. RuntimeError: it is a copy that lost its hook.
    """
    if not isinstance(model, nn.Module):
        return of_pipeline(model)
    return fsdp.of(model) if is_fsdp(model) else ddp.of(model)


def wrap_pipeline(
    thing: Any,
    policy: PolicyLike | None = None,
    *,
    backward: PolicyLike | None = None,
    seed: int | None = None,
    timeout: float | None = None,
) -> Any:
    """Compress what travels between the stages of a pipeline; returns the same object.

    Every rank of the pipeline calls it, with the same arguments, before the first step. A second
    call reconfigures: what is not given stays, but `policy` alone is for both directions; memory
    stays unless something changes.

    Mistakes are found before a step sends anything, and raise on all ranks. In a step a rank waits
    inside the process group: of another one's failure it hears when that one's connection closes,
    or when the group's timeout (`init_process_group`) is over.

    Args:
        thing: a schedule; or the stage, or the list of all stages, of this rank, which is enough
            for schemes that need nothing of a step.
        policy: for activations and, without `backward`, their gradients (`parse`).
        backward: for the gradients of activations.
        seed: of the random streams of stochastic codecs; None: what it was, at first 0.
        timeout: seconds an agreement may take; None: the group's.

    Raises: ValueError: a scheme that activations cannot have (error feedback), a mode that needs
        the schedule. RuntimeError: ranks disagree. Then all is as it was.
    """
    stages, schedule = _parts(thing)
    check_settings(seed, timeout)
    old: Any = getattr(stages[0], "commlib_ports", None)
    if old is not None and policy is None and backward is None:
        parsed = old.policy
    else:
        parsed = parse(old.policy if old is not None and policy is None else policy, backward)
    seed = (0 if old is None else old.seed) if seed is None else seed
    kind = "stages" if schedule is None else type(schedule).__name__
    facts = facts_of(stages[0], parsed, kind, seed)
    if schedule is not None:
        facts["microbatches"] = schedule._n_microbatches
    if old is not None and old.aborted:
        old = None
    if old is not None:  # whether it stays or goes, on all ranks alike
        old.confirm(facts)
    stays = old is not None and (old.policy, old.seed) == (parsed, seed)
    pipeline: Pipeline = (
        old if stays else Pipeline(stages, parsed, facts, seed=seed, timeout=timeout)
    )
    # after the agreement, so that all ranks hear of it, and before anything is replaced
    if schedule is None and (refusal := _why_not(stages, pipeline)):
        raise ValueError(refusal)
    if not stays:
        for stage in stages:
            attach(stage, pipeline)
    elif timeout is not None:
        pipeline.set_timeout(timeout)
    if schedule is not None:
        attach_schedule(schedule, pipeline)
    return thing


def of_pipeline(thing: Any) -> Pipeline:
    """What commlib knows of a wrapped schedule or stage. ValueError where it is not wrapped."""
    stages, _ = _parts(thing)
    found: Pipeline | None = getattr(stages[0], "commlib_ports", None)
    if found is None:
        raise ValueError("this pipeline is not wrapped; call commlib.wrap(schedule, policy) first")
    return found


def _no_parameters(parameters: object, why: str) -> None:
    if parameters is not None:
        raise ValueError(f"parameters={parameters!r} is for models sharded by fully_shard; {why}")


def _parts(thing: Any) -> tuple[list[Any], Any]:
    """The stages of this rank, and the schedule if that is what `thing` is."""
    if isinstance(thing, list | tuple):
        stages, schedule = list(thing), None
    elif hasattr(thing, "_n_microbatches"):
        schedule = thing
        stages = list(thing._stages) if hasattr(thing, "_stages") else [thing._stage]
    else:
        stages, schedule = [thing], None
    if not stages or not all(hasattr(stage, "get_fwd_recv_ops") for stage in stages):
        raise ValueError(
            f"wrap takes a pipeline schedule, a stage or a list of stages, got "
            f"{type(thing).__name__}"
        )
    return stages, schedule


def _why_not(stages: list[Any], pipeline: Pipeline) -> str:
    """Why stages without their schedule are not enough; empty where they are."""
    if pipeline.needs_ids or pipeline.needs_fresh:
        return (
            f"{pipeline.policy} must know of every step: wrap the schedule, whose step then takes "
            "sample_ids= (+delta) or is_fresh= (+reuse)"
        )
    if stages[0].num_stages > stages[0].group_size * len(stages):
        return (
            f"this rank has more than the {len(stages)} of {stages[0].num_stages} stages given: "
            "wrap the schedule, or a list of all stages of this rank"
        )
    return ""


__all__ = ["DDPState", "FSDPState", "Pipeline", "of", "wrap"]
