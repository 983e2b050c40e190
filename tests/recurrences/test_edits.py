"""A changed state, write or decay is the recurrence with that change written into its loop."""

from __future__ import annotations

import pytest
import torch

from circuitbench.errors import BadInput
from circuitbench.recurrences import RECURRENCES
from tests.recurrences import reference
from tests.recurrences.cases import case, close, each_moment, each_recurrence


@pytest.mark.parametrize("length", [1, 37, 130])
@each_moment
def test_an_edit_is_written_into_the_loop(name, length, when) -> None:
    layer = case(name, length=length)
    value = layer.some_state()
    edits = {0: torch.zeros_like, length - 1: lambda h: 2 * h + 1, length // 2: lambda h: h * value + 1}
    inside = {**edits, length // 3: lambda h: value.double()}
    outside = {**edits, length // 3: value}  # by value
    y, states = reference.run(name, layer.operands, layer.initial_state, layer.D, inside, when)
    options = {"initial_state": layer.initial_state, "edits": outside, "when": when}
    ours, final = layer.module.forward(**layer.operands, D=layer.D, **options)
    close(ours, y, 1e-5)
    close(final, states[:, -1], 1e-5)
    close(layer.module.states(**layer.operands, **options), states, 1e-5)


@each_moment
def test_an_edit_at_every_position(name, when) -> None:
    layer = case(name).to(torch.float64)
    edits = {t: lambda h, t=t: h + t for t in range(37)}
    y, _ = reference.run(name, layer.operands, layer.initial_state, edits=edits, when=when)
    ours, _ = layer.module.forward(**layer.operands, initial_state=layer.initial_state, edits=edits, when=when)
    close(ours, y, 1e-12)


@each_moment
def test_after_read_leaves_the_output_there_and_before_read_does_not(name, when) -> None:
    layer = case(name).to(torch.float64)
    plain, _ = layer.module.forward(**layer.operands)
    y, _ = layer.module.forward(**layer.operands, edits={10: lambda h: h + 1}, when=when)
    changed = (y - plain).abs().amax((0, *range(2, y.ndim))) > 1e-9
    assert changed.nonzero()[0].item() == (10 if when == "before_read" else 11)


def test_the_output_of_rwkv4_does_not_read_its_own_positions_write() -> None:
    layer = case("wkv4")
    for edits in (None, {3: torch.zeros_like}):
        with pytest.raises(BadInput, match=r"before position t's write.*when=\"after_read\""):
            layer.module.forward(**layer.operands, edits=edits, when="before_read")


@each_recurrence
def test_the_identity_edit_changes_nothing(name) -> None:
    layer = case(name)
    plain, final = layer.module.forward(**layer.operands)
    y, state = layer.module.forward(**layer.operands, edits={9: lambda h: h})
    close(y, plain, 1e-6)
    close(state, final, 1e-6)


@each_recurrence
def test_an_edit_in_place_is_an_edit(name) -> None:
    layer = case(name)

    def halve(h: torch.Tensor) -> torch.Tensor:
        h[:] = h / 2
        return h

    by_value, _ = layer.module.forward(**layer.operands, edits={9: lambda h: h / 2}, when="after_read")
    in_place, _ = layer.module.forward(**layer.operands, edits={9: halve}, when="after_read")
    assert torch.equal(in_place, by_value)
    assert torch.equal(
        layer.module.states(**layer.operands, edits={9: halve}),
        layer.module.states(**layer.operands, edits={9: lambda h: h / 2}),
    )


@each_recurrence
def test_a_replaced_decay_is_used_instead_of_the_models(name) -> None:
    layer = case(name, length=70)
    decay = layer.module.decay_of(**layer.operands)
    decay[:, 3] = 0.0  # forgets everything
    decay[:, 5] = -0.5
    decay[:, 8] = 1.5
    edits = {20: lambda h: h + 1}
    y, states = reference.run(name, layer.operands, layer.initial_state, edits=edits, decay=decay)
    options = {"initial_state": layer.initial_state, "edits": edits, "decay": decay}
    ours, final = layer.module.forward(**layer.operands, **options)
    close(ours, y, 1e-5)
    close(final, states[:, -1], 1e-5)
    close(layer.module.states(**layer.operands, **options), states, 1e-5)


@each_recurrence
def test_a_replaced_write_is_exactly_what_is_added(name) -> None:
    # For the gated delta rule the other rows keep the model's own rule, which answers to the changed state.
    layer = case(name, length=70)
    write = layer.module.write_of(**layer.operands, initial_state=layer.initial_state)
    changed = write.clone()
    changed[:, 5] = 0.0
    changed[1, 40, 2] += 1.0

    def one_row(own: torch.Tensor) -> torch.Tensor:
        own = own.clone()
        own[1, 2] = changed[1, 40, 2].double()
        return own

    inside = {5: torch.zeros_like, 40: one_row}
    edits = {20: lambda h: h + 1}
    for edited in ({}, edits):
        y, states = reference.run(
            name, layer.operands, layer.initial_state, edits=edited, write=inside, when="after_read"
        )
        options = {"initial_state": layer.initial_state, "edits": edited, "write": changed, "when": "after_read"}
        ours, final = layer.module.forward(**layer.operands, **options)
        close(ours, y, 1e-5)
        close(final, states[:, -1], 1e-5)
        close(layer.module.states(**layer.operands, **options), states, 1e-5)


@each_recurrence
def test_the_models_own_write_and_decay_change_nothing(name) -> None:
    layer = case(name, length=70)
    options = {"initial_state": layer.initial_state}
    own = {
        "write": layer.module.write_of(**layer.operands, **options),
        "decay": layer.module.decay_of(**layer.operands),
    }
    plain, _ = layer.module.forward(**layer.operands, **options)
    for replaced in ({"write": own["write"]}, {"decay": own["decay"]}, own):
        close(layer.module.forward(**layer.operands, **options, **replaced)[0], plain, 1e-5)


BAD = [
    ({"edits": {37: torch.zeros_like}}, "position 37; the positions of this sequence are 0 to 36"),
    ({"edits": {-1: torch.zeros_like}}, "position -1"),
    ({"edits": {3: lambda h: None}}, "position 3 gives NoneType"),
    ({"edits": {3: torch.zeros(2)}}, r"position 3 gives \(2,\); the state is"),
    ({"when": "later"}, 'when=\'later\' is not possible; use "before_read" or "after_read"'),
    ({"initial_state": torch.zeros(1)}, r"initial_state has shape \(1,\); it must be \(b=2, "),
    ({"decay": torch.zeros(1)}, r"decay has shape \(1,\)"),
    ({"write": torch.zeros(1)}, r"write has shape \(1,\)"),
    ({"D": torch.zeros(99)}, r"D has shape \(99,\)"),
    ({"C": torch.zeros(2, 36, 3)}, r"C has shape \(2, 36, 3\); it must be \(b=2, t=37, "),
    ({"accumulate": torch.int32}, "accumulate=torch.int32 is not possible"),
]


@pytest.mark.parametrize(("wrong", "sentence"), BAD, ids=[sentence[:30] for _, sentence in BAD])
@each_recurrence
def test_bad_input_gets_one_sentence(name, wrong, sentence, as_users_have_it) -> None:
    layer = case(name)
    if "C" in wrong and "C" not in layer.operands:  # RWKV-7 calls it r; where y is the state, nothing reads it out
        other = {"rwkv7": "r", "rg_lru": "a", "wkv4": "k"}[name]
        wrong, sentence = {other: wrong["C"]}, sentence.replace("C", other, 1)
    with pytest.raises(ValueError, match=sentence) as raised:
        layer.module.forward(**layer.operands | wrong)
    assert "\n" not in str(raised.value)


@each_recurrence
def test_an_empty_sequence_is_refused(name, as_users_have_it) -> None:
    with pytest.raises(ValueError, match="empty"):
        RECURRENCES[name].forward(**case(name, length=0).operands)


@each_recurrence
def test_a_chunk_of_no_positions_is_refused(name, as_users_have_it) -> None:
    with pytest.raises(ValueError, match="chunk=0 is not possible"):
        RECURRENCES[name].iter_states(**case(name).operands, chunk=0)


def test_groups_must_divide_the_heads(as_users_have_it) -> None:
    with pytest.raises(ValueError, match="4 heads and B 3 groups"):
        RECURRENCES["ssd"].forward(**case("ssd", groups=3).operands)
