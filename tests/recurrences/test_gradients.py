"""Gradients are those of the recurrence, at a cost linear in the length."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from circuitbench.recurrences import _dplr, _selective_scan, gated_delta, mlstm, ssd
from tests.recurrences.cases import case, close, each_moment, each_recurrence


def gradcheck(function, inputs) -> bool:
    """Along random directions: the whole Jacobian, number by number, takes minutes."""
    return torch.autograd.gradcheck(function, inputs, fast_mode=True)


@pytest.fixture
def small_chunks(monkeypatch) -> None:
    """So that short sequences have several chunks and tiles."""
    monkeypatch.setattr(_selective_scan, "CHUNK", 2)
    monkeypatch.setattr(_selective_scan, "TILE", 4)
    monkeypatch.setattr(ssd, "CHUNK", 2)
    monkeypatch.setattr(gated_delta, "CHUNK", 2)
    monkeypatch.setattr(_dplr, "CHUNK", 2)
    monkeypatch.setattr(mlstm, "CHUNK", 2)


def small(name):
    sizes = {"s6": {"channels": 3, "n": 2}, "ssd": {"heads": 2, "p": 2, "groups": 1, "n": 2}}
    sizes |= {"rg_lru": {"channels": 2}, "wkv4": {"channels": 2}}
    layer = case(name, batch=1, length=5, **sizes.get(name, {"heads": 2, "dk": 2, "dv": 2})).to(torch.float64)
    inputs = [*layer.operands.values(), layer.D, layer.initial_state]
    return layer, [v.requires_grad_() for v in inputs]


def function_of(layer, **options):
    names = [*layer.operands, "D", "initial_state"]
    return lambda *inputs: layer.module.forward(**dict(zip(names, inputs, strict=True)), **options)


@each_recurrence
def test_gradients_are_finite_differences(name, small_chunks) -> None:
    layer, inputs = small(name)
    assert gradcheck(function_of(layer), inputs)


@each_moment
def test_gradients_through_edits_are_finite_differences(name, when, small_chunks) -> None:
    layer, inputs = small(name)
    value = layer.some_state().requires_grad_()

    def edited(*inputs):
        edits = {1: lambda h: h * h, 2: inputs[-1], 4: lambda h: h.sin()}
        return function_of(layer, edits=edits, when=when)(*inputs[:-1])

    assert gradcheck(edited, [*inputs, value])


@each_recurrence
def test_gradients_of_replaced_decays_and_writes_are_finite_differences(name, small_chunks) -> None:
    layer, inputs = small(name)
    decay = layer.module.decay_of(**layer.operands).detach().requires_grad_()
    write = torch.randn_like(layer.module.write_of(**layer.operands)).requires_grad_()

    def replaced(*inputs):
        return function_of(layer, decay=inputs[-2], write=inputs[-1])(*inputs[:-2])

    assert gradcheck(replaced, [*inputs, decay, write])
    assert gradcheck(lambda decay: function_of(layer, decay=decay)(*inputs), [decay])


@each_recurrence
def test_second_derivatives_are_finite_differences(name, small_chunks) -> None:
    layer, inputs = small(name)
    assert torch.autograd.gradgradcheck(function_of(layer), inputs, fast_mode=True)


@each_recurrence
def test_gradients_of_all_states_are_finite_differences(name, small_chunks) -> None:
    layer, inputs = small(name)
    del inputs[-2]  # D
    names = [*layer.operands, "initial_state"]
    states = lambda *inputs: layer.module.states(**dict(zip(names, inputs, strict=True)), edits={2: torch.tanh})  # noqa: E731
    assert gradcheck(states, inputs)


@each_recurrence
def test_each_operand_alone_gets_the_gradient_it_gets_among_all(name) -> None:
    # The fused backward of S6 leaves out what nobody asked for.
    layer = case(name)
    inputs = [*layer.operands.values(), layer.D, layer.initial_state]
    weights = torch.randn_like(layer.operands["x"])
    y, _ = function_of(layer)(*[v.requires_grad_() for v in inputs])
    together = torch.autograd.grad(y, inputs, weights)
    for i, expected in enumerate(together):
        alone = [v.detach().requires_grad_(i == j) for j, v in enumerate(inputs)]
        y, _ = function_of(layer)(*alone)
        (grad,) = torch.autograd.grad(y, alone[i], weights)
        close(grad, expected, 1e-6)


@each_recurrence
def test_backward_leaves_the_gradient_it_was_given_alone(name) -> None:
    layer = case(name)
    y, final = layer.module.forward(**{k: v.requires_grad_() for k, v in layer.operands.items()})
    given = [torch.randn_like(y), torch.randn_like(final)]
    kept = [g.clone() for g in given]
    torch.autograd.grad((y, final), layer.operands["x"], given)
    assert all(torch.equal(g, k) for g, k in zip(given, kept, strict=True))


class NumbersWritten(TorchDispatchMode):
    """Counts the numbers all operations put out: a measure of cost that does not depend on the machine."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple | list) else [out]:
            if isinstance(value, torch.Tensor) and value._base is None:  # a view writes nothing
                self.count += value.numel()
        return out


@pytest.mark.parametrize("edited", ["nowhere", "everywhere"])
@each_recurrence
def test_cost_is_linear_in_length(name, edited) -> None:
    costs = []
    for length in (64, 256):
        layer = case(name, batch=1, length=length)
        edits = {t: lambda h: 0.9 * h for t in range(length)} if edited == "everywhere" else {}
        with NumbersWritten() as written:
            y, _ = layer.module.forward(**{k: v.requires_grad_() for k, v in layer.operands.items()}, edits=edits)
            y.sum().backward()
        costs.append(written.count)
    assert costs[1] < 4.5 * costs[0]


@each_recurrence
def test_the_gradient_of_the_models_own_write_is_the_adjoint_of_the_state(name) -> None:
    # What one position adds, later ones following the recurrence: also for the rule that answers to the state.
    layer = case(name).to(torch.float64)
    options = {"initial_state": layer.initial_state}
    write = layer.module.write_of(**layer.operands, **options).requires_grad_()
    y, _ = layer.module.forward(**layer.operands, **options, write=write)
    weights = torch.randn_like(y)
    (grad,) = torch.autograd.grad(y, write, weights)
    close(grad, layer.module.adjoint(**layer.operands, grad_y=weights, **layer.start), 1e-12)


@each_recurrence
def test_a_write_made_from_the_operands_hands_its_gradient_on_to_them(name) -> None:
    layer = case(name).to(torch.float64)
    inputs = [v.requires_grad_() for v in layer.operands.values()]
    plain, _ = layer.module.forward(**layer.operands)
    y, _ = layer.module.forward(**layer.operands, write=layer.module.write_of(**layer.operands))
    weights = torch.randn_like(y)
    expected = torch.autograd.grad(plain, inputs, weights)
    largest = max(right.abs().max().item() for right in expected)  # y does not depend on the units a state is held in
    for grad, right in zip(torch.autograd.grad(y, inputs, weights), expected, strict=True):
        assert (grad - right).abs().max() <= 1e-12 * largest
