"""The error tables are what the codecs do to a gradient, and nothing else."""

from __future__ import annotations

import pytest
import torch

from commlib.codecs import codec
from commlib.planner import Errors, plan, uniform
from commlib.planner.errors import squared_error
from commlib.planner.schemes import CANDIDATES
from commlib.policy import TensorInfo
from commlib.scheme import Scheme
from tests.communicators import data

SHAPES = {"w": (64, 64), "norm": (4096,), "small": (8, 8), "unused": (64, 32)}


def infos() -> dict[str, TensorInfo]:
    return {
        name: TensorInfo(name, torch.Size(shape).numel(), torch.float32, ndim=len(shape))
        for name, shape in SHAPES.items()
    }


def gradients() -> dict[str, torch.Tensor]:
    found = {
        name: data(i, torch.Size(s).numel()).view(s) for i, (name, s) in enumerate(SHAPES.items())
    }
    found["unused"].zero_()
    return found


def measured(schemes: tuple[str, ...] = CANDIDATES) -> Errors:
    table = Errors(infos(), schemes)
    for name, gradient in gradients().items():
        table.add(name, gradient)
    return table


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_error_is_that_of_rounding_to_nearest(bits: int) -> None:
    x = torch.linspace(-1, 1, 4096)
    levels = 2 ** (bits - 1) - 1
    blocks = x.view(-1, 128).double()
    # the scale of a block, without its rounding up to bf16, which moves it by 2^-7 at most
    step = blocks.abs().amax(1, keepdim=True) / levels
    exact = (blocks - step * (blocks / step).round()).square().sum()
    found = squared_error(x, Scheme.parse(f"int{bits}+ef"))
    assert found.dtype is torch.float64
    assert found.item() == pytest.approx(exact.item(), rel=0.3)
    assert found <= x.numel() * (step.max() * (1 + 2**-7) / 2) ** 2


def test_the_rounding_is_that_of_the_scheme() -> None:
    x = data(0, 1 << 14)
    # E (u - 1/2)^2 of stochastic rounding is twice that of nearest
    nearest, random = (squared_error(x, Scheme.parse(s)).item() for s in ("int6+ef", "int6"))
    assert random / nearest == pytest.approx(2, rel=0.05)
    assert squared_error(x, Scheme.parse("fp32")).item() == 0


def test_errors_add_up_over_gradients() -> None:
    once, twice = measured(), measured()
    for name, gradient in gradients().items():
        twice.add(name, gradient)
    assert torch.equal(twice.table, 2 * once.table)


def test_layers_have_errors_costs_and_the_choices_they_may_have() -> None:
    w, norm, small, unused = measured().layers("int4+ef")
    assert w.schemes == CANDIDATES
    assert list(w.errors) == sorted(w.errors, reverse=True)
    assert list(w.costs) == [codec(f"int{b}").nbytes(_layout(4096)) for b in range(2, 9)]
    # vectors and small tensors stay exact; what was zero has shown nothing
    assert norm.schemes == small.schemes == ("fp32",)
    assert norm.errors == small.errors == (0.0,)
    assert norm.costs == (4096 * 4,)
    assert unused.schemes == ("int4+ef",)


def test_a_scheme_that_is_no_candidate_of_a_tensor_leaves_the_row_in_order() -> None:
    half = {"w": TensorInfo("w", 4096, torch.bfloat16, ndim=2)}
    table = Errors(half, ("bf16", "int2+ef", "int8+ef"))
    x = data(0, 4096).bfloat16()
    table.add("w", x)
    (layer,) = table.layers("int8+ef")
    assert layer.schemes == ("int2+ef", "int8+ef")
    assert layer.errors[1] == squared_error(x, Scheme.parse("int8+ef")).item()


def test_what_has_one_lossy_candidate_loses_something_too() -> None:
    table = measured(("int4+ef",))
    w, norm, small, unused = table.layers("int4+ef")
    assert w.schemes == ("int4+ef",)
    expected = squared_error(gradients()["w"].flatten(), Scheme.parse("int4+ef")).item()
    assert w.errors == (expected,)
    assert expected > 0
    assert norm.errors == small.errors == unused.errors == (0.0,)
    assert not table.table[[1, 2]].any()  # exact: not even its energy
    # the budget of the others is what it was: the layer spends what it brings
    made = plan(table.layers("int4+ef"))
    assert made.error == made.budget == expected


def test_a_gradient_that_is_not_finite_is_no_table() -> None:
    table = Errors(infos(), CANDIDATES)
    x = data(0, 4096)
    x[7] = torch.nan
    table.add("w", x)
    with pytest.raises(ValueError, match="layer 'w': error nan"):
        table.layers("int4+ef")


def test_a_layer_of_large_gradients_gets_more_bits() -> None:
    infos = {n: TensorInfo(n, 1 << 14, torch.float32, ndim=2) for n in "ab"}
    table = Errors(infos, CANDIDATES)
    table.add("a", data(0, 1 << 14))
    table.add("b", 100 * data(1, 1 << 14))
    layers = table.layers("int4+ef")
    made = plan(layers)
    assert made.schemes == {"a": "int2+ef", "b": "int5+ef"}
    assert made.error <= uniform(layers).error


def _layout(numel: int) -> object:
    from commlib_kernels.layout import Layout

    return Layout((numel,), align=128)
