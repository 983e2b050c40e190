"""Several blocks on one scan, edits that come too late, and batches with beams: nothing is lost without a word."""

from __future__ import annotations

import pytest
import torch

import circuitbench as cb

P = torch.tensor([[5, 17, 3, 44, 9, 21]])
FAMILIES = ["mamba", "mamba2", "falcon_h1", "qwen3_next"]


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest) -> cb.Model:
    return cb.load_model(f"random:{request.param}")


@pytest.fixture(scope="module")
def mamba2() -> cb.Model:
    return cb.load_model("random:mamba2")


def logits(model: cb.Model) -> torch.Tensor:
    with torch.no_grad():
        with model.trace(P):
            out = model.logits.save()
    return out


PAIRS = {
    "state, state": (
        cb.Scale("layers.0.ssm.state", 0.0, positions=[2]),
        cb.Scale("layers.0.ssm.state", 0.0, positions=[4]),
    ),
    "x, state": (cb.Scale("layers.0.ssm.x", 0.5), cb.Scale("layers.0.ssm.state", 0.5, positions=[3])),
    "y, state": (cb.Scale("layers.0.ssm.y", 0.5), cb.Scale("layers.0.ssm.state", 0.5, positions=[3])),
    "decay, B": (cb.Scale("layers.0.ssm.decay", 0.5), cb.Scale("layers.0.ssm.B", 0.5)),
    "y, gate": (cb.Scale("layers.0.ssm.y", 0.5), cb.Scale("layers.0.ssm.gate", 0.5)),
}


@pytest.mark.parametrize("pair", PAIRS)
def test_interventions_in_two_blocks_are_those_in_one(model: cb.Model, pair: str) -> None:
    first, second = PAIRS[pair]
    together = cb.intervene(model, P, [first, second]).logits
    with cb.hold(model, first):
        torch.testing.assert_close(cb.intervene(model, P, second).logits, together, rtol=1e-5, atol=1e-6)
        with cb.hold(model, second):
            torch.testing.assert_close(logits(model), together, rtol=1e-5, atol=1e-6)
    assert (logits(model) - together).abs().max() > 1e-5


def test_a_block_reads_what_a_held_intervention_wrote(model: cb.Model) -> None:
    with cb.hold(model, cb.Set("layers.0.ssm.x", 0.0)), torch.no_grad():
        with model.trace(P):
            x = model.layers[0].ssm.x.save()
            states = model.layers[0].ssm.state.save()
    assert x.abs().max() == 0
    assert states.abs().max() == 0


def test_an_identity_edit_leaves_a_held_intervention_alone(model: cb.Model) -> None:
    with cb.hold(model, cb.Set("layers.0.ssm.x", 0.0)):
        held = logits(model)
        with torch.no_grad():
            with model.trace(P):
                model.layers[0].ssm.edit_state({4: lambda h: h * 1.0})
                again = model.logits.save()
    torch.testing.assert_close(again, held, rtol=1e-5, atol=1e-6)


def test_an_edit_in_place_that_comes_too_late_is_an_error(model: cb.Model) -> None:
    late = pytest.raises(cb.BadInput, match="edited in place after the model had moved past it")
    with late, torch.no_grad():
        with model.trace(P):
            y = model.layers[0].ssm.y
            model.layers[0].ssm.gated.save()
            y[:] = 0
    with late, torch.no_grad():
        with model.trace(P):
            resid = model.layers[0].resid_post
            model.layers[1].resid_post.save()
            resid[:] = 0
    with late:
        with model.trace(P):
            resid = model.layers[0].ssm.out
            model.layers[1].resid_post.save()
            resid[:] = 0


def test_a_fused_projection_does_not_lose_an_edit_of_its_first_part() -> None:
    model = cb.load_model("random:gpt2")
    with pytest.raises(cb.BadInput, match="moved past it"):
        with model.trace(P):
            q = model.layers[0].attn.q
            model.layers[0].attn.k.save()
            q[:] = 0


def test_the_same_tensor_under_two_names_may_be_edited_under_the_later_one(mamba2: cb.Model) -> None:
    with torch.no_grad():
        with mamba2.trace(P):
            mamba2.layers[0].resid_post.save()
            mamba2.layers[1].resid_pre[:, 2] = 0
            out = mamba2.logits.save()
    expected = cb.intervene(mamba2, P, cb.Set("layers.1.resid_pre", 0.0, positions=[2])).logits
    torch.testing.assert_close(out, expected)


def test_a_saved_residual_stays_what_it_was_when_the_site_is_written() -> None:
    model = cb.load_model("random:bamba")
    with torch.no_grad():
        with model.trace(P):
            plain = model.layers[0].resid_mid.save()
    with torch.no_grad():
        with model.trace(P):
            kept = model.layers[0].resid_mid.save()
            model.layers[0].resid_mid = kept * 0
            out = model.logits.save()
    torch.testing.assert_close(kept, plain, rtol=0, atol=0)
    torch.testing.assert_close(out, cb.intervene(model, P, cb.Set("layers.0.resid_mid", 0.0)).logits)


def test_invokes_with_beams_read_their_own_rows(mamba2: cb.Model) -> None:
    first, second = [5, 17, 3, 44, 9, 21], [7, 8, 9, 30, 31, 32]
    with torch.no_grad():
        with mamba2.trace(torch.tensor([second])):
            alone = mamba2.layers[0].ssm.y.save()
        with mamba2.generate(max_new_tokens=2, num_beams=2) as tracer:
            with tracer.invoke(torch.tensor([first])):
                mamba2.layers[0].ssm.dt.save()
            with tracer.invoke(torch.tensor([second])):
                y = mamba2.layers[0].ssm.y.save()
    torch.testing.assert_close(y, alone.repeat_interleave(len(y), 0), rtol=1e-4, atol=1e-6)


def test_the_mixing_matrix_is_refused_where_it_would_not_be_the_scan(mamba2: cb.Model) -> None:
    with pytest.raises(cb.BadInput, match="read it in a run of its own"), torch.no_grad():
        with mamba2.trace(P):
            mamba2.layers[0].ssm.decay *= 0.5
            mamba2.layers[0].ssm.mixing.save()


def test_inference_mode_is_no_mode_of_its_own(model: cb.Model) -> None:
    def run() -> torch.Tensor:
        with model.trace(P):
            model.layers[0].ssm.x[:, 3] = 0
            model.layers[0].ssm.y[:, 4] *= 2
            out = model.logits.save()
        return out

    with torch.no_grad():
        expected = run()
    with torch.inference_mode():
        actual = run()
    torch.testing.assert_close(actual.clone(), expected)


def test_knockouts_of_different_heads_share_a_run(mamba2: cb.Model) -> None:
    one = [cb.Knockout("layers.0.ssm", sources=[1], destinations="last", heads=[head]) for head in (0, 2)]
    both = cb.Knockout("layers.0.ssm", sources=[1], destinations="last", heads=[0, 2])
    torch.testing.assert_close(cb.intervene(mamba2, P, one).logits, cb.intervene(mamba2, P, both).logits)
