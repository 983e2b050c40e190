"""Adjoint, mixing matrix, knockout and frozen form: what a scan being linear in x makes exact."""

from __future__ import annotations

import pytest
import torch

from circuitbench.recurrences import RECURRENCES, s6
from tests.recurrences import reference
from tests.recurrences.cases import BY_CHANNEL, Case, case, close, each_recurrence


def gradients(loss: torch.Tensor, leaves: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Zero for a state that nothing reads, as RWKV-4's last."""
    return torch.autograd.grad(loss, leaves, retain_graph=True, materialize_grads=True)


@each_recurrence
def test_adjoint_is_the_gradient_at_every_state(name) -> None:
    # By autograd through the reference's loop, where a leaf is added to each state.
    layer = case(name, length=12).to(torch.float64)
    leaves = [torch.zeros_like(layer.initial_state, requires_grad=True) for _ in range(12)]
    edits = {t: lambda h, t=t: h + leaves[t] for t in range(12)}
    y, states = reference.run(name, layer.operands, layer.initial_state, edits=edits)
    grad_y, grad_final = torch.randn_like(y), torch.randn_like(states[:, -1])
    total = (y * grad_y).sum()
    for loss, options in ((total, {}), (total + (states[:, -1] * grad_final).sum(), {"grad_final_state": grad_final})):
        expected = torch.stack(gradients(loss, leaves), 1)
        close(layer.module.adjoint(**layer.operands, grad_y=grad_y, **options, **layer.start), expected, 1e-12)


@each_recurrence
def test_adjoint_is_differentiable(name) -> None:
    layer = case(name, batch=1, length=4).to(torch.float64)
    extra = {"grad_y": torch.randn_like(layer.operands["x"]), "grad_final_state": layer.initial_state, **layer.start}
    named = {key: value.requires_grad_() for key, value in (layer.operands | extra).items()}

    def adjoint(*values: torch.Tensor) -> torch.Tensor:
        return layer.module.adjoint(**dict(zip(named, values, strict=True)))

    assert torch.autograd.gradcheck(adjoint, list(named.values()), fast_mode=True)


@each_recurrence
def test_adjoint_follows_a_replaced_decay(name) -> None:
    layer = case(name, length=6)
    decay = layer.module.decay_of(**layer.operands)
    decay[:, 3] = 0.0
    grad_y = torch.zeros_like(layer.operands["x"])
    grad_y[:, 5] = 1.0
    adjoint = layer.module.adjoint(**layer.operands, grad_y=grad_y, decay=decay, **layer.start)
    leaves = [torch.zeros_like(layer.initial_state, requires_grad=True) for _ in range(6)]
    edits = {t: lambda h, t=t: h + leaves[t] for t in range(6)}
    y, _ = reference.run(name, layer.operands, layer.initial_state, edits=edits, decay=decay)
    close(adjoint, torch.stack(gradients((y * grad_y).sum(), leaves), 1), 1e-5)
    # What stands before a vanishing decay is lost, but for what RWKV-7's a asks of the state before it decays.
    assert (adjoint[:, :3] == 0).all() == (name != "rwkv7")


def mixing_of(layer: Case, started: bool = False) -> torch.Tensor:
    """`(b, heads, t, t)`; the channels of S6 and the like as heads. Where y is a ratio, in the run from a state."""
    options = {"channels": range(layer.operands["x"].shape[2])} if layer.name in BY_CHANNEL else {}
    return layer.module.mixing(**layer.operands, **options, **(layer.start if started else {}))


def mix(mixing: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return torch.einsum("bhts,bsh...->bth...", mixing, x)


@pytest.mark.parametrize("length", [1, 37, 100])
@each_recurrence
def test_the_mixing_matrix_is_the_scan(name, length) -> None:
    layer = case(name, length=length)
    mixing = mixing_of(layer)
    y, _ = reference.run(name, layer.operands, torch.zeros_like(layer.initial_state))
    close(mix(mixing, layer.operands["x"]), y, 1e-5)
    assert (mixing.triu(1) == 0).all()


def test_s6_mixes_the_asked_channels_only() -> None:
    layer = case("s6")
    all_channels = mixing_of(layer)
    assert torch.equal(s6.mixing(**layer.operands, channels=[4, 1]), all_channels[:, [4, 1]])
    with pytest.raises(ValueError, match="give channels=, one or more of 0 to 4"):
        s6.mixing(**layer.operands)
    with pytest.raises(ValueError, match=r"channels=\[5\] is not possible; give one or more of 0 to 4"):
        s6.mixing(**layer.operands, channels=[5])


@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("some_heads", [False, True])
@each_recurrence
def test_a_knockout_zeroes_entries_of_the_mixing_matrix(name, per_row, some_heads) -> None:
    layer = case(name).to(torch.float64)
    x, options = layer.operands["x"], {"D": layer.D, "initial_state": layer.initial_state}
    shape = (2, 37) if per_row else (37,)
    sources, destinations = torch.rand(shape) < 0.3, torch.rand(shape) < 0.5
    sources[..., 4] = destinations[..., 4] = True  # a position may be kept from itself
    pairs = destinations.expand(2, 37)[:, None, :, None] & sources.expand(2, 37)[:, None, None, :]
    mixing = mixing_of(layer, started=True)
    heads = torch.ones(mixing.shape[1], dtype=torch.bool)
    if some_heads:
        heads = torch.arange(mixing.shape[1]) == 1
        options["channels" if name in BY_CHANNEL else "heads"] = [1]
    removed = mix(mixing * (pairs & heads[:, None, None]), x)
    plain, final = layer.module.forward(**layer.operands, D=layer.D, initial_state=layer.initial_state)
    y, state = layer.module.knockout(**layer.operands, sources=sources, destinations=destinations, **options)
    close(y, plain - removed, 1e-12)
    assert torch.equal(state, final)


@each_recurrence
def test_a_knockout_of_nothing_changes_nothing(name) -> None:
    layer = case(name)
    nothing, everything = torch.zeros(37, dtype=torch.bool), torch.ones(37, dtype=torch.bool)
    plain, _ = layer.module.forward(**layer.operands)
    for masks in ((nothing, everything), (everything, nothing)):
        assert torch.equal(layer.module.knockout(**layer.operands, sources=masks[0], destinations=masks[1])[0], plain)


@each_recurrence
def test_a_knockout_of_all_pairs_leaves_skip_and_initial_state(name) -> None:
    layer = case(name)
    everything = torch.ones(37, dtype=torch.bool)
    options = {"D": layer.D, "initial_state": layer.initial_state}
    y, _ = layer.module.knockout(**layer.operands, sources=everything, destinations=everything, **options)
    silent = layer.operands | {"x": torch.zeros_like(layer.operands["x"])}
    from_state, _ = layer.module.forward(**silent, initial_state=layer.initial_state)
    skip = layer.D if name in BY_CHANNEL else layer.D[:, None]
    close(y, from_state + skip * layer.operands["x"], 1e-5)


@each_recurrence
def test_masks_that_do_not_fit_are_refused(name, as_users_have_it) -> None:
    layer, good = case(name), torch.ones(37, dtype=torch.bool)
    knockout, parts = RECURRENCES[name].knockout, "channels" if name in BY_CHANNEL else "heads"
    with pytest.raises(ValueError, match=r"sources is torch.float32 of shape \(37,\)"):
        knockout(**layer.operands, sources=good.float(), destinations=good)
    with pytest.raises(ValueError, match=r"destinations is torch.bool of shape \(36,\).*\(37,\) or \(2, 37\)"):
        knockout(**layer.operands, sources=good, destinations=good[1:])
    with pytest.raises(ValueError, match=rf"{parts}=\[9\] is not possible"):
        knockout(**layer.operands, sources=good, destinations=good, **{parts: [9]})


@each_recurrence
def test_the_frozen_form_is_linear_and_closes(name) -> None:
    layer = case(name).to(torch.float64)
    inputs = [v.requires_grad_() for v in (*layer.operands.values(), layer.D)]
    x, module, rest = layer.operands["x"], layer.module, {k: v for k, v in layer.operands.items() if k != "x"}
    y, final = module.frozen(**layer.operands, D=layer.D)
    plain, state = module.forward(**layer.operands, D=layer.D)
    assert torch.equal(y, plain) and torch.equal(final, state)
    gradients = torch.autograd.grad(y.sum(), inputs, allow_unused=True)
    assert [grad is None for grad in gradients] == [v is not x for v in inputs]
    close((gradients[0] * x).sum(), y.sum(), 1e-12)
    other = torch.randn_like(x)
    combined, _ = module.frozen(x=2 * x - 3 * other, **rest, D=layer.D)
    close(combined, 2 * y - 3 * module.frozen(x=other, **rest, D=layer.D)[0], 1e-12)


@each_recurrence
def test_the_frozen_gradient_is_the_mixing_matrix_transposed(name) -> None:
    layer = case(name).to(torch.float64)
    x = layer.operands["x"].requires_grad_()
    weights = torch.randn_like(x)
    y, _ = layer.module.frozen(**layer.operands)
    (grad,) = torch.autograd.grad(y, x, weights)
    close(grad, mix(mixing_of(layer).mT, weights), 1e-12)


def test_s6_with_heads_is_one_scan_a_head() -> None:
    """Zamba's layout: every verb gives for head i what it gives for that head's operands alone."""
    here = case("s6", batch=2, length=19, heads=3)
    mask = torch.arange(19) % 3 == 0
    grad = torch.randn_like(here.operands["x"])

    def alone(head: int) -> dict[str, torch.Tensor]:
        return {key: value[head] if key == "A" else value[:, :, head] for key, value in here.operands.items()}

    adjoint = s6.adjoint(**here.operands, grad_y=grad, grad_final_state=here.initial_state)
    cut, _ = s6.knockout(**here.operands, sources=mask, destinations=~mask, D=here.D, channels=[5 + 1])
    mixed = s6.mixing(**here.operands, channels=[5 + 1, 2])
    for head in range(3):
        own = alone(head)
        expected = s6.adjoint(**own, grad_y=grad[:, :, head], grad_final_state=here.initial_state[:, head])
        close(adjoint[:, :, head], expected, 1e-6)
        expected, _ = s6.forward(**own, D=here.D[head])
        if head == 1:
            expected, _ = s6.knockout(**own, sources=mask, destinations=~mask, D=here.D[head], channels=[1])
        close(cut[:, :, head], expected, 1e-6)
    close(mixed[:, :1], s6.mixing(**alone(1), channels=[1]), 1e-6)
    close(mixed[:, 1:], s6.mixing(**alone(0), channels=[2]), 1e-6)
