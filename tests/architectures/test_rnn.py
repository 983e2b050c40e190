"""What only RecurrentGemma, RWKV-4 and xLSTM have: units and rescaling, states on modules, pieces, broken batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import circuitbench as cb
from circuitbench.tracing import Add, Knockout, Scale, capture, hold, intervene
from tests.architectures.cases import RNN, load, plain, prompts, relative
from tests.ndif.plugin import NdifServer, save_for_server

IDS = torch.tensor(prompts(9, 9))
DEEP = {"num_hidden_layers": 7, "rescale_every": 6}  # transformers' own rescale_every; the last layer is past it


def streams(hf: Any) -> list[Tensor]:
    """What the layers hand on, as transformers computes it."""
    seen: list[Tensor] = []
    handles = [layer.register_forward_hook(lambda m, a, out: seen.append(out[0].detach())) for layer in hf.rwkv.blocks]
    with torch.no_grad():
        hf(IDS)
    for handle in handles:
        handle.remove()
    return seen


# RWKV-4's rescaling ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ran", [False, True], ids=["fresh", "rescaled before"])
def test_the_stream_of_rwkv_is_shown_without_its_rescaling(ran: bool) -> None:
    hf = plain("rwkv", **DEEP)
    if ran:
        with torch.no_grad():
            hf(IDS)
        assert hf.rwkv.layers_are_rescaled
    found = capture(cb.load_model(hf), IDS, "layers.*.resid_post")
    halved = streams(hf)
    assert all(torch.equal(found[f"layers.{i}.resid_post"], halved[i]) for i in range(6))
    assert torch.equal(found["layers.6.resid_post"], 2 * halved[6])  # to the last bit
    # The same weights without any rescaling: only the epsilon of the layer norms tells them apart.
    twin = plain("rwkv", num_hidden_layers=7, rescale_every=0)
    assert relative(found["layers.6.resid_post"], streams(twin)[6]) < 1e-3


@pytest.mark.parametrize("site", ["resid_pre", "ssm.out", "resid_mid", "mlp.out", "resid_post"])
def test_what_is_added_to_the_stream_of_rwkv_is_added_to_the_true_one(site: str) -> None:
    """The halving is undone: adding a vector after it changes the stream there by that vector, exactly."""
    model, vector = load("rwkv", **DEEP), torch.randn(32)
    address, after = f"layers.6.{site}", "layers.6.resid_mid" if site in ("resid_pre", "ssm.out") else address_of(site)
    base = capture(model, IDS, after)[after]
    out = intervene(model, IDS, Add(address, vector, positions=[8]), sites=[after])
    moved = (out.sites[after] - base)[:, 8]
    if site != "resid_pre":  # which the mixer reads too
        torch.testing.assert_close(moved, vector.expand_as(moved), rtol=1e-5, atol=1e-5)
    assert torch.equal(out.sites[after][:, :8], base[:, :8])


def address_of(site: str) -> str:
    return "layers.6.resid_post" if site != "resid_mid" else "layers.6.resid_mid"


def test_in_training_mode_rwkv_is_not_rescaled_and_neither_are_its_sites() -> None:
    model = load("rwkv", **DEEP)
    eval_mode = capture(model, IDS, "layers.6.resid_post")["layers.6.resid_post"]
    model.hf.train()
    found = capture(model, IDS, "layers.6.resid_post")["layers.6.resid_post"]
    assert torch.equal(found, streams(model.hf)[6])
    assert relative(found, eval_mode) < 1e-3
    model.hf.eval()
    assert torch.equal(capture(model, IDS, "layers.6.resid_post")["layers.6.resid_post"], eval_mode)


def test_the_logits_of_rwkv_are_transformers_own() -> None:
    model, hf = load("rwkv", **DEEP), plain("rwkv", **DEEP)
    with torch.no_grad():
        with model.trace(IDS):
            logits = model.logits.save()
        assert torch.equal(logits, hf(IDS).logits)


# Batches --------------------------------------------------------------------------------------------------------------


def test_one_token_at_a_time_rwkv_takes_one_prompt() -> None:
    """transformers would read each prompt's token shift from the others."""
    model, singles = load("rwkv"), torch.tensor([[5], [7]])
    apart = torch.cat([plain("rwkv")(row[None]).logits.detach() for row in singles])
    together = plain("rwkv")(singles).logits.detach()
    assert together.shape != apart.shape or relative(together, apart) > 1e-3  # transformers alone
    for run in (lambda: model.hf(singles), lambda: capture(model, singles, "layers.0.ssm.y")):
        with torch.no_grad(), pytest.raises(cb.BadInput, match="prompts.*of rwkv.*one by one"):
            run()
    assert relative(model.hf(singles, use_cache=False).logits, apart) < 1e-6
    texts = model.generate_text(IDS, max_new_tokens=4)
    assert texts == [model.generate_text(row.tolist(), max_new_tokens=4) for row in IDS]


@pytest.mark.parametrize("family", RNN)
def test_padding_is_refused_where_transformers_ignores_the_mask(family: str) -> None:
    model = load(family)
    mask = torch.ones_like(IDS)
    mask[1, :3] = 0
    with torch.no_grad():
        with pytest.raises(cb.BadInput, match="padding.*one length"):
            with model.trace(IDS, attention_mask=mask):
                model.logits.save()
    with pytest.raises(cb.BadInput, match="runs its recurrence through padding"):
        intervene(model, prompts(9, 6), Add("layers.0.resid_pre", 1.0))


@pytest.mark.parametrize("family", RNN)
def test_every_writable_site_takes_interventions(family: str) -> None:
    model = load(family)
    sites = [site for site in model.sites if not site.endswith((".scale", ".mixing"))]
    for site in sites:
        item = Scale(site, torch.tensor([0.5]), positions=[1, -2], channels=slice(1))
        assert intervene(model, IDS, item).delta_norm > 1e-7, site
    together = intervene(model, IDS, [Scale(site, 0.9, positions=[1, -1]) for site in sites])
    for row in range(2):
        alone = intervene(model, IDS[row : row + 1], [Scale(site, 0.9, positions=[1, -1]) for site in sites])
        assert relative(together.logits[row], alone.logits[0]) < 2e-5


@pytest.mark.parametrize("family", RNN)
def test_a_knockout_is_a_hole_in_the_mixing_matrix(family: str) -> None:
    """The other weights stay as they are, and so does what is left in the state."""
    model, heads = load(family), [1] if family == "xlstm" else None
    channels = [0, 3, 31]
    with torch.no_grad():
        with model.trace(IDS):
            ssm = model.layers[0].ssm
            x, states = ssm.x.clone().save(), ssm.state.clone().save()
            mixing = (ssm.mixing if heads else ssm.mixing(channels=channels)).save()
            y = ssm.y.save()
    out = intervene(
        model, IDS, Knockout("layers.0.ssm", [2, 3], [5, -1], heads), ["layers.0.ssm.y", "layers.0.ssm.state"]
    )
    hole = torch.zeros(9, 9)
    hole[[5, 5, 8, 8], [2, 3, 2, 3]] = 1
    if heads:
        removed = torch.einsum("bts,bsp->btp", mixing[:, 1] * hole, x[:, :, 1])
        expected = y.clone()
        expected[:, :, 1] -= removed
        assert relative(out["layers.0.ssm.y"], expected) < 1e-5
    else:
        removed = torch.einsum("bcts,bsc->btc", mixing * hole, x[..., channels])
        assert relative(out["layers.0.ssm.y"][..., channels], y[..., channels] - removed) < 1e-5
        with pytest.raises(cb.BadInput, match="no heads"):
            intervene(model, IDS, Knockout("layers.0.ssm", [2], [5], [1]))
    assert removed.abs().max() > 1e-3
    assert torch.equal(out["layers.0.ssm.state"], states)


# RecurrentGemma's modules ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 2, 9])
def test_nothing_of_a_generation_is_left_in_the_next_run(length: int) -> None:
    """RecurrentGemma keeps its state on its modules; a prompt of one token would go on from there."""
    model, ids = load("recurrent_gemma"), torch.tensor(prompts(length, seed=1))
    fresh, text = plain("recurrent_gemma")(ids).logits.detach(), load("recurrent_gemma").generate_text(ids)
    before = model.generate_text(IDS[:1], max_new_tokens=5)
    with torch.no_grad():
        with model.trace(ids):
            logits = model.logits.save()
    assert torch.equal(logits, fresh)
    assert model.generate_text(IDS[:1], max_new_tokens=5) == before
    assert model.generate_text(ids) == text
    assert not model.hf.training


def test_the_logits_of_recurrent_gemma_are_capped() -> None:
    model = load("recurrent_gemma", logits_soft_cap=2.0)
    with torch.no_grad():
        with model.trace(IDS):
            uncapped = model.nn.lm_head.output.save()
            logits = model.logits.save()
    torch.testing.assert_close(logits, 2 * torch.tanh(uncapped / 2))
    assert logits.abs().max() < 2 < uncapped.abs().max()


def test_a_document_inside_a_sequence_starts_from_nothing() -> None:
    """Where position_ids begin again, RecurrentGemma forgets: the decay is 0, and the state edited there is the new."""
    model, positions = load("recurrent_gemma"), torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]]).expand(2, -1)
    with torch.no_grad():
        with model.trace(IDS, position_ids=positions):
            decay = model.layers[0].ssm.decay.save()
            states = model.layers[0].ssm.edit_state({3: lambda h: h + 100}).save()
    assert (decay[:, [0, 4]] == 0).all() and (decay[:, [1, 2, 3, 5, 6, 7, 8]] > 0).all()
    assert states[:, 3].mean() > 50 > states[:, 4:].abs().max()


# xLSTM's pieces and projections ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", RNN)
def test_gradients_reach_the_first_layer_whatever_the_cache(family: str, dtype: torch.dtype) -> None:
    """transformers writes the caches of RWKV-4 and xLSTM in place, over what the backward needs."""
    model, ids = load(family, dtype), torch.tensor(prompts(17, 17))  # over two chunks of xLSTM
    with model.trace(ids):
        embed = model.embed
        gradient = torch.autograd.grad(model.logits.tanh().sum(), embed)[0].save()
    assert (gradient != 0).any(-1).all()
    out = model.hf(ids)
    assert out.get("state", out.get("cache_params")) is None  # nothing that would not be what it seems
    with torch.no_grad():
        assert torch.equal(model.hf(ids, use_cache=True).logits, out.logits)


def test_a_long_prompt_of_xlstm_is_seen_whole() -> None:
    """transformers runs more than max_inference_chunksize tokens in pieces, without gradients."""
    short, hf = plain("xlstm"), plain("xlstm", max_inference_chunksize=4)
    model = cb.load_model(hf)
    got = capture(model, IDS, ["layers.1.ssm.state", "layers.1.resid_post"])
    assert got["layers.1.ssm.state"].shape[1] == got["layers.1.resid_post"].shape[1] == 9
    with torch.no_grad():
        assert relative(model.hf(IDS).logits, short(IDS).logits) < 1e-6
    with model.trace(IDS):
        x = model.layers[0].ssm.x
        gradient = torch.autograd.grad(model.logits.sum(), x)[0].save()
    assert (gradient != 0).any(-1).all()


def test_xlstms_fused_projections_are_the_same_sites(monkeypatch: pytest.MonkeyPatch) -> None:
    apart = load("xlstm")
    # transformers cannot make fresh weights for this mode (its bias does not fit), but loads them.
    monkeypatch.setattr("transformers.models.xlstm.modeling_xlstm.xLSTMPreTrainedModel._init_weights", lambda *_: None)
    fused = plain("xlstm", weight_mode="fused")
    weights = dict(apart.hf.state_dict())
    for layer in range(2):
        part = f"backbone.blocks.{layer}.mlstm_layer"
        for name, pieces in (("qkv_opreact", ("q", "k", "v", "ogate_preact")), ("ifgate_preact", ("igate", "fgate"))):
            for kind in ("weight", "bias"):
                names = [f"{part}.{piece.removesuffix('_preact')}" for piece in pieces]
                names = [f"{n}_preact.{kind}" if "gate" in n else f"{n}.{kind}" for n in names]
                if names[0] in weights:
                    weights[f"{part}.{name}.{kind}"] = torch.cat([weights.pop(n) for n in names])
        ffn = f"backbone.blocks.{layer}.ffn"
        pair = [weights.pop(f"{ffn}.{name}.weight") for name in ("proj_up_gate", "proj_up")]
        weights[f"{ffn}.proj_up_gate_z.weight"] = torch.cat(pair)
    fused.load_state_dict(weights)
    model = cb.load_model(fused)
    assert set(model.sites) - set(apart.sites) == {f"layers.{layer}.ssm.in_proj" for layer in range(2)}
    sites = [site for site in apart.sites if not site.endswith(".mixing")]
    theirs, ours = capture(apart, IDS, sites), capture(model, IDS, sites)
    for site in sites:
        assert relative(ours[site], theirs[site]) < 1e-5, site
    plain_logits = model.hf(IDS).logits.detach()
    for name in ("in_proj", "gate"):
        out = intervene(model, IDS, Add(f"layers.0.ssm.{name}", 1.0))
        assert relative(out.logits, plain_logits) > 1e-3


# While decoding -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", RNN)
def test_a_held_intervention_counts_the_tokens_that_are_generated(family: str) -> None:
    """An edit at position 11 comes at the third token after a prompt of 9, and nowhere else."""
    model, prompt = load(family), IDS[:1]
    site = "layers.0.ssm.state"
    with hold(model, Add(site, 3.0, positions=[11])), torch.no_grad():
        with model.generate(prompt, max_new_tokens=6, min_new_tokens=6) as tracer:
            steps, ids = [].save(), None
            for _ in tracer.iter[:6]:
                steps.append(model.logits[:, -1].clone())
            ids = tracer.result.save()
    whole = intervene(model, ids[:, :-1], Add(site, 3.0, positions=[11])).logits
    plain_logits = intervene(model, ids[:, :-1], []).logits
    assert relative(torch.stack(list(steps), 1), whole[:, 8:]) < 1e-5
    first = 11 if family != "rwkv" else 12  # y of RWKV-4 reads the state before
    assert relative(whole[:, :first], plain_logits[:, :first]) < 1e-5
    assert relative(whole[:, first], plain_logits[:, first]) > 1e-5


# On a server ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", RNN)
def test_a_server_gives_the_same_numbers(family: str, ndif_server: NdifServer, tmp_path: Path) -> None:
    settings = {"vocab_size": 257, **(DEEP if family == "rwkv" else {})}
    model = cb.load_model(save_for_server(plain(family, **settings), tmp_path))

    def run(remote: str | bool) -> dict[str, Tensor]:
        last = model.layers[len(model.layers) - 1]
        with torch.no_grad():
            with model.trace("how does it compute", remote=remote):
                found, ssm = {}.save(), model.layers[0].ssm
                if ssm.sites[0] == "gate":  # xLSTM's comes later
                    found["gate"] = ssm.gate
                found["decay"] = ssm.decay.clone()
                ssm.x[:, 2] = 0
                found["states"] = ssm.edit_state({4: torch.zeros_like})
                found["y"] = ssm.y.clone()
                last.resid_post = last.resid_post + 1.0
                found["resid"] = last.resid_post.clone()
                found["logits"] = model.logits.clone()
        return dict(found)

    here, there = run(False), run(ndif_server.url)
    for name, value in here.items():
        torch.testing.assert_close(there[name], value, rtol=1e-5, atol=1e-5, msg=name)
    texts = [model.generate_text("how does it", max_new_tokens=5, remote=where) for where in (ndif_server.url, False)]
    assert texts[0] == texts[1]
