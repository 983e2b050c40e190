"""A recurrence from its step alone gives what the recurrences written by hand give, verb by verb."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from circuitbench.errors import BadInput, UnsupportedModel
from circuitbench.recurrences import RECURRENCES, Stepwise, recurrence_of, register
from tests.recurrences.cases import Case, case, close
from tests.recurrences.stepwise_cases import DEEP, STEPWISE, deep_case

each = pytest.mark.parametrize("name", list(STEPWISE))


def deep_loop(operands, state, edits=None, when="before_read", given=None):
    """The same with its slopes by hand, in a plain loop: outputs and states.

    Args:
        edits: Position -> function of the state.
        given: Position -> what is added in the first row, instead of the step.
    """
    outputs, states = [], []
    for t, (x, k, q, rate, keep) in enumerate(zip(*(v.unbind(1) for v in operands.values()), strict=True)):
        W, V = state.unbind(1)
        hidden = torch.tanh(torch.einsum("bk,bkm->bm", k, W))
        wrong = torch.einsum("bm,bmv->bv", hidden, V) - x
        back = torch.einsum("bv,bmv->bm", wrong, V) * (1 - hidden**2)
        slopes = torch.stack((torch.einsum("bk,bm->bkm", k, back), torch.einsum("bm,bv->bmv", hidden, wrong)), 1)
        added = -rate[:, None, None, None] * slopes
        if t in (given or {}):
            added = torch.cat((given[t][None], added[1:]))
        reached = keep[:, None, None, None] * state + added
        state = (edits or {}).get(t, lambda own: own)(reached)
        W, V = (state if when == "before_read" else reached).unbind(1)
        outputs.append(torch.einsum("bm,bmv->bv", torch.tanh(torch.einsum("bk,bkm->bm", q, W)), V))
        states.append(state)
    return torch.stack(outputs, 1), torch.stack(states, 1)


# By hand and stepwise -------------------------------------------------------------------------------------------------


def agree(name: str, use: Callable[[Any, Case], list[Tensor]], relative: float = 1e-5, **sizes: int) -> None:
    """What some verbs give, by hand and stepwise, is the same."""
    layer = case(name, **{"length": 21, **sizes})
    for by_hand, stepwise in zip(use(layer.module, layer), use(STEPWISE[name], layer), strict=True):
        assert by_hand.shape == stepwise.shape and by_hand.dtype == stepwise.dtype
        close(stepwise, by_hand, relative)


def started(layer: Case) -> dict[str, Tensor]:
    return {**layer.operands, "initial_state": layer.initial_state}


@each
@pytest.mark.parametrize(("dtype", "relative"), [(torch.float32, 1e-5), (torch.float64, 1e-12), (torch.bfloat16, 1e-2)])
def test_outputs_states_decays_and_writes(name, dtype, relative) -> None:
    def use(module, layer):
        layer = layer.to(dtype)
        return [
            *module.forward(**started(layer), D=layer.D),
            *module.forward(**layer.operands, accumulate=torch.float64),
            module.states(**started(layer)),
            module.decay_of(**layer.operands),
            module.write_of(**started(layer)),
        ]

    agree(name, use, relative)


@each
@pytest.mark.parametrize("when", ["before_read", "after_read"])
def test_edits_of_the_state(name, when) -> None:
    def use(module, layer):
        edits = {0: torch.zeros_like, 3: layer.initial_state, 9: lambda h: 2 * h + 1, 20: lambda h: h.mul_(-1)}
        given = {**started(layer), "edits": edits, "when": when}
        chunks = [h for _, h in module.iter_states(**given, chunk=21)]
        return [*module.forward(**given), module.states(**given), torch.cat(chunks, 1)]

    agree(name, use)


@pytest.mark.parametrize("chunk", [1, 4, 7, 100, None])
def test_states_come_in_chunks_that_are_the_callers(chunk) -> None:
    layer = case("gated_delta", length=21)
    states, position = STEPWISE["gated_delta"].states(**layer.operands), 0
    for start, part in STEPWISE["gated_delta"].iter_states(**layer.operands, chunk=chunk):
        assert start == position and torch.equal(part, states[:, start : start + part.shape[1]])
        assert part.shape[1] == min(chunk or 21, 21 - start)
        position += part.shape[1]
        part.zero_()
    assert position == 21


@each
def test_replaced_decays_and_writes_and_all_gradients(name) -> None:
    def use(module, layer):
        layer = layer.to(torch.float64)
        decay = module.decay_of(**layer.operands) ** 2
        decay[:, 4] = -0.5
        write = (
            module.write_of(**started(layer), decay=decay)
            if name == "gated_delta"
            else module.write_of(**started(layer))
        )
        write[:, 5] = 0
        write[1, 9, 1] += 1
        edits = {7: lambda h: h + 1, 12: torch.sin}
        leaves = {key: value.requires_grad_() for key, value in started(layer).items()}
        leaves |= {"write": write.requires_grad_(), "decay": decay.requires_grad_()}
        y, final = module.forward(**leaves, edits=edits)
        target = y.sin().sum() + final.cos().sum()
        return [y, final, *torch.autograd.grad(target, list(leaves.values()), materialize_grads=True)]

    agree(name, use, 1e-10)


@each
def test_a_write_made_from_the_operands_hands_its_gradient_on_to_them(name) -> None:
    def use(module, layer):
        leaves = {key: value.requires_grad_() for key, value in started(layer.to(torch.float64)).items()}
        write = module.write_of(**leaves)
        y, _ = module.forward(**leaves, write=write)
        return list(torch.autograd.grad(y.sin().sum(), [*leaves.values(), write]))

    agree(name, use, 1e-10)


@each
def test_adjoint_mixing_knockout_and_frozen(name) -> None:
    mask = torch.arange(21) % 3 == 0
    rows = torch.stack((mask, ~mask))

    def use(module, layer):
        grad_y = torch.linspace(-1, 1, layer.operands["x"].numel()).reshape(layer.operands["x"].shape)
        by_channel = {"channels": [3, 1]} if name == "s6" else {}
        part = {"channels": [1]} if name == "s6" and module is not STEPWISE["s6"] else {"heads": [1]}
        cut = {"sources": rows, "destinations": ~rows, "D": layer.D}
        return [
            module.adjoint(**layer.operands, grad_y=grad_y),
            module.adjoint(**layer.operands, grad_y=grad_y, grad_final_state=layer.initial_state),
            module.mixing(**layer.operands, **by_channel),
            *module.knockout(**started(layer), **cut),
            *module.knockout(**started(layer), **cut, **part),
            *module.frozen(**started(layer), D=layer.D),
        ]

    agree(name, use)
    with torch.no_grad():
        agree(name, use)


def test_the_frozen_form_depends_on_x_alone() -> None:
    layer = case("gated_delta")
    leaves = {key: value.requires_grad_() for key, value in started(layer).items()}
    y, _ = STEPWISE["gated_delta"].frozen(**leaves, D=layer.D.requires_grad_())
    found = torch.autograd.grad(y.sum(), [*leaves.values(), layer.D], allow_unused=True)
    assert [grad is not None for grad in found] == [name == "x" for name in (*leaves, "D")]


# A recurrence that is linear in nothing -------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["before_read", "after_read"])
def test_a_memory_that_takes_gradient_steps_is_its_plain_loop(when) -> None:
    operands, start = deep_case()
    edits = {2: lambda h: -h, 6: lambda h: h + 1}
    y, states = deep_loop(operands, start, edits, when)
    options = {"initial_state": start, "edits": edits, "when": when}
    ours, final = DEEP.forward(**operands, **options)
    close(ours, y, 1e-12)
    close(final, states[:, -1], 1e-12)
    close(DEEP.states(**operands, **options), states, 1e-12)


def test_a_replaced_write_is_added_and_later_steps_answer_to_it() -> None:
    operands, start = deep_case()
    write = DEEP.write_of(**operands, initial_state=start)
    kept = torch.cat((start[:, None], DEEP.states(**operands, initial_state=start)[:, :-1]), 1)
    close(DEEP.decay_of(**operands)[..., None, None, None] * kept + write, deep_loop(operands, start)[1], 1e-12)
    write[0, 3] = 1.0
    write[0, 5, 1, 2, 3] += 1.0
    given = {3: write[0, 3], 5: write[0, 5]}
    y, states = deep_loop(operands, start, given=given)
    ours, _ = DEEP.forward(**operands, initial_state=start, write=write)
    close(ours, y, 1e-12)
    close(DEEP.states(**operands, initial_state=start, write=write), states, 1e-12)


def test_its_adjoint_is_the_gradient_at_every_state() -> None:
    operands, start = deep_case(4)
    leaves = [torch.zeros_like(start, requires_grad=True) for _ in range(4)]
    y, states = deep_loop(operands, start, {t: lambda h, t=t: h + leaves[t] for t in range(4)})
    grad_y, grad_final = torch.randn_like(y), torch.randn_like(start)
    expected = torch.autograd.grad((y * grad_y).sum() + (states[:, -1] * grad_final).sum(), leaves)
    given = {**operands, "initial_state": start, "grad_y": grad_y, "grad_final_state": grad_final}
    for tracked in (True, False):
        with torch.set_grad_enabled(tracked):
            close(DEEP.adjoint(**given), torch.stack(expected, 1), 1e-12)
    named = {key: value.requires_grad_() for key, value in given.items()}
    adjoint = lambda *values: DEEP.adjoint(**dict(zip(named, values, strict=True)))  # noqa: E731
    assert torch.autograd.gradcheck(adjoint, list(named.values()), fast_mode=True)


def test_its_gradients_are_finite_differences() -> None:
    operands, start = deep_case(4)
    write = torch.randn(2, 4, 2, 4, 4, dtype=torch.float64)
    named = {**operands, "initial_state": start, "write": write, "decay": DEEP.decay_of(**operands)}
    named = {key: value.detach().requires_grad_() for key, value in named.items()}

    def function(*values):
        return DEEP.forward(**dict(zip(named, values, strict=True)), edits={1: torch.sin})

    assert torch.autograd.gradcheck(function, list(named.values()), fast_mode=True)
    plain = {**operands, "initial_state": start}
    leaves = [value.detach().requires_grad_() for value in plain.values()]
    assert torch.autograd.gradgradcheck(
        lambda *values: DEEP.forward(**dict(zip(plain, values, strict=True))), leaves, fast_mode=True
    )


@pytest.mark.parametrize("verb", ["mixing", "knockout", "frozen"])
def test_it_has_no_linear_forms(verb) -> None:
    everything = torch.ones(11, dtype=torch.bool)
    masks = {"sources": everything, "destinations": everything} if verb == "knockout" else {}
    with pytest.raises(BadInput, match=rf"no {verb} of this recurrence: its y is not linear in x"):
        getattr(DEEP, verb)(**deep_case()[0], **masks)


@pytest.mark.parametrize("channels", [None, [0]])
def test_a_matrix_that_is_not_the_scans_is_not_handed_out(channels) -> None:
    def step(h, now):
        return h + now.x.roll(1, -1)  # linear, and no channel keeps to itself

    wrong = Stepwise(step, lambda h, now: h, {"x": "b t h v"}, "b h v", linear=True)
    with pytest.raises(BadInput, match=f"not one matrix.*{'head' if channels is None else 'channel'}"):
        wrong.mixing(x=torch.randn(2, 5, 2, 3), channels=channels)


# What does not fit ----------------------------------------------------------------------------------------------------


def stepwise(**changed: Any) -> Stepwise:
    given = {"step": lambda h, now: h + now.x, "read": lambda h, now: h, "operands": {"x": "b t d"}, "state": "b d"}
    return Stepwise(**{**given, **changed})


SAID = [
    ({"operands": {"k": "b t d"}}, r"operand x has axes None; give it, with \"b t\" first"),
    ({"operands": {"x": "t b d"}}, "operand x has axes 't b d'"),
    ({"operands": {"x": "b t d", "decay": "b t"}}, "cannot be called 'decay'"),
    ({"state": "b e"}, r"state has axes 'b e'; .* \(e is neither\)"),
    ({"state": "d b"}, "they begin with b"),
    ({"state": "b t d"}, "are without t"),
    ({"decay_axes": "b d"}, "give both decay and decay_axes"),
    ({"decay": lambda now: now.x}, "give both decay and decay_axes"),
    ({"decay": lambda now: now.x, "decay_axes": "d b"}, r"some of the state's axes \(b d\), in their order"),
]


@pytest.mark.parametrize(("said", "sentence"), SAID, ids=[sentence[:30] for _, sentence in SAID])
def test_axes_that_do_not_fit_together_are_refused(said, sentence) -> None:
    with pytest.raises(BadInput, match=sentence):
        stepwise(**said)


X = torch.randn(2, 5, 3)
GIVEN = [
    ({}, {"x": X, "k": X}, "operands of this recurrence are x; given were x, k"),
    ({}, {}, "operands of this recurrence are x; given were"),
    ({}, {"x": X[0]}, r"x has shape \(5, 3\)"),
    ({"state": "b 2 d"}, {"x": X, "initial_state": torch.zeros(2, 3, 3)}, r"initial_state has .* \(b=2, 2, d=3\)"),
    ({}, {"x": X, "decay": X}, "names no decay; give Stepwise its decay="),
    ({"step": lambda h, now: now.x.sum()}, {"x": X}, r"step gives \(\); the state is \(2, 3\) \(b d\)"),
    ({"step": lambda h, now: None}, {"x": X}, "step gives NoneType"),
    ({"read": lambda h, now: h.sum()}, {"x": X}, r"read gives \(\); y of one position has the batch, 2,"),
    ({"read": lambda h, now: h[:, :2]}, {"x": X, "D": torch.ones(3)}, "D·x does not fit"),
    (
        {"decay": lambda now: now.x[:, 0], "decay_axes": "b d"},
        {"x": X},
        r"decay gives \(2,\); by decay_axes .* \(2, 3\)",
    ),
    ({}, {"x": X, "edits": {5: torch.zeros_like}}, "position 5; the positions of this sequence are 0 to 4"),
]


@pytest.mark.parametrize(("said", "given", "sentence"), GIVEN, ids=[sentence[:30] for *_, sentence in GIVEN])
def test_what_does_not_fit_gets_one_sentence(said, given, sentence, as_users_have_it) -> None:
    with pytest.raises(BadInput, match=sentence) as raised:
        stepwise(**said).forward(**given)
    assert "\n" not in str(raised.value)


def test_an_operand_that_is_not_there_is_named() -> None:
    with pytest.raises(AttributeError, match="given x; there is no operand 'k'"):
        stepwise(step=lambda h, now: h + now.k).forward(x=X)


def test_a_step_that_works_in_place_harms_nobody() -> None:
    def step(h, now):
        now.x.mul_(2)
        return h.add_(now.x)

    start, x = torch.randn(2, 3), X.clone()
    with torch.no_grad():
        states = stepwise(step=step).states(x=x, initial_state=start.clone())
    close(states, start[:, None] + 2 * X.cumsum(1), 1e-6)
    assert torch.equal(x, X)


# Its name -------------------------------------------------------------------------------------------------------------


def test_a_name_is_for_one_recurrence_and_never_one_of_ours(monkeypatch) -> None:
    monkeypatch.setattr("circuitbench.recurrences.RECURRENCES", dict(RECURRENCES))
    mine = register("mine", stepwise())
    assert recurrence_of("mine") is mine
    assert recurrence_of("mine") is not register("mine", stepwise())  # a cell that is run twice
    with pytest.raises(BadInput, match="'ssd' is a recurrence of circuitbench; give yours another name"):
        register("ssd", mine)
    with pytest.raises(BadInput, match="'other' has no forward, states, iter_states, decay_of"):
        register("other", object())
    with pytest.raises(UnsupportedModel, match=r"no recurrence 'lost'; there are s6, .*, mine\. Add yours with"):
        recurrence_of("lost")
