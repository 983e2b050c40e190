"""capture: a padded batch is each prompt alone, whatever is kept, however it is cut up; the model stops early."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import circuitbench as cb
from circuitbench.tracing import capture, resolve
from circuitbench.tracing.addresses import axes_by_address
from tests.architectures.cases import PADDED, load, prompts, relative

LENGTHS = (9, 6, 11, 1)
ROWS = prompts(*LENGTHS)


@pytest.fixture(scope="module")
def mamba2() -> cb.Model:
    return load("mamba2")


def capturable(model: cb.Model) -> list[str]:
    """All sites but those that take arguments."""
    return [site for site in model.sites if "channels" not in axes_by_address(model, site)]


def own(model: cb.Model, site: str, value: Tensor, length: int) -> Tensor:
    """The first `length` positions on every axis that counts them."""
    for axis, name in enumerate(axes_by_address(model, site)[1:]):
        if name == "t":
            value = value.narrow(axis, 0, length)
    return value


@pytest.mark.parametrize("variant", [*PADDED, "falcon_h1-no-norm", "zamba2-rope", "mamba2-many-groups"])
def test_a_padded_batch_is_each_prompt_alone(variant: str) -> None:
    model = load(variant)
    sites = capturable(model)
    together = capture(model, ROWS, sites)
    assert together.lengths.tolist() == list(LENGTHS)
    for number, ids in enumerate(ROWS):
        alone = capture(model, [ids], sites)
        for site in sites:
            assert relative(own(model, site, together[site][number], len(ids)), alone[site][0]) < 1e-5, site
            if len(ids) < max(LENGTHS) and axes_by_address(model, site)[1] == "t":
                assert together[site][number, len(ids) :].isnan().all(), site


@pytest.mark.parametrize("family", ["mamba", "mamba2", "jamba", "qwen3_next", "gpt2"])
def test_what_is_captured_is_what_a_trace_reads(family: str) -> None:
    model, ids = load(family), torch.tensor(ROWS[:1])
    layer = model.layers[0]
    with torch.no_grad():
        with model.trace(ids):
            before = layer.resid_pre.save()
            inside = (layer.ssm.gated if "ssm.y" in layer.sites else layer.attn.z).save()
            after = layer.resid_post.save()
    name = "ssm.gated" if "ssm.y" in layer.sites else "attn.z"
    got = capture(model, ids, [f"layers.0.{site}" for site in ("resid_post", "resid_pre", name)] + ["logits"])
    assert list(got) == ["layers.0.resid_pre", f"layers.0.{name}", "layers.0.resid_post", "logits"]  # forward order
    expected = [before, inside, after, model.hf(ids).logits.detach()]
    for value, wanted in zip(got.values(), expected, strict=True):
        assert torch.equal(value, wanted)


SITES = ["layers.0.ssm.state", "layers.0.ssm.y", "layers.1.resid_post", "layers.0.ssm.mixing"]


@pytest.mark.parametrize(
    "positions", [0, -1, "last", [0, -1], slice(2, 5), slice(-3, None), torch.tensor([1, 2])], ids=str
)
def test_positions_keep_those_of_each_prompt(mamba2: cb.Model, positions: Any) -> None:
    rows = ROWS[:3]
    full, kept = capture(mamba2, rows, SITES), capture(mamba2, rows, SITES, positions=positions)
    for number, ids in enumerate(rows):
        wanted = list(range(len(ids)))
        wanted = wanted[-1:] if positions == "last" else torch.tensor(wanted)[positions].reshape(-1).tolist()
        for site in SITES[:3]:
            torch.testing.assert_close(kept[site][number], full[site][number, wanted], rtol=1e-5, atol=1e-7)
        # Matrices over positions keep the rows: what these positions read.
        rows_kept = own(mamba2, "layers.0.ssm.mixing", full["layers.0.ssm.mixing"][number], len(ids))[:, wanted]
        got = kept["layers.0.ssm.mixing"][number]
        torch.testing.assert_close(got[..., : len(ids)], rows_kept, rtol=1e-5, atol=1e-7)


def test_a_mask_keeps_other_positions_of_every_prompt(mamba2: cb.Model) -> None:
    rows = ROWS[:2]
    mask = torch.zeros(2, 9, dtype=torch.bool)
    mask[0, [1, 8]] = mask[1, [0, 5]] = True
    full = capture(mamba2, rows, "layers.1.ssm.y")["layers.1.ssm.y"]
    kept = capture(mamba2, rows, "layers.1.ssm.y", positions=mask)["layers.1.ssm.y"]
    torch.testing.assert_close(kept[0], full[0, [1, 8]])
    torch.testing.assert_close(kept[1], full[1, [0, 5]])


@pytest.mark.parametrize("positions", [None, "last"])
def test_batches_and_files_hold_the_same(mamba2: cb.Model, tmp_path: Path, positions: Any) -> None:
    sites = ["layers.0.ssm.gated", "layers.1.resid_post", "layers.0.ssm.mixing"]
    whole = capture(mamba2, ROWS, sites, positions=positions)
    cut = capture(mamba2, ROWS, sites, positions=positions, batch_size=3)
    for site in sites[:2]:
        torch.testing.assert_close(cut[site], whole[site], rtol=1e-5, atol=1e-6, equal_nan=True)
    left = capture(mamba2, ROWS, sites, positions=positions, batch_size=3, out=tmp_path)
    assert dict(left) == {}
    assert left.lengths.tolist() == list(LENGTHS)
    shards = [load_file(file) for file in sorted(tmp_path.glob("*.safetensors"))]
    assert [shard["lengths"].tolist() for shard in shards] == [[9, 6, 11], [1]]
    for site in sites[:2]:
        for number, shard in enumerate(shards):
            expected = cut[site][3 * number : 3 * number + 3, : shard[site].shape[1]]
            torch.testing.assert_close(shard[site], expected, rtol=0, atol=0, equal_nan=True)


def test_tokens_are_all_real_ones_in_order(mamba2: cb.Model) -> None:
    got = capture(mamba2, ROWS, "layers.1.resid_post", batch_size=2)
    tokens = got.tokens("layers.1.resid_post")
    assert tokens.shape == (sum(LENGTHS), 32)
    alone = torch.cat([capture(mamba2, [ids], "layers.1.resid_post")["layers.1.resid_post"][0] for ids in ROWS])
    torch.testing.assert_close(tokens, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("family", "layers"), [("mamba", 2), ("jamba", 4), ("gpt2", 2), ("nemotron_h", 5)])
def test_the_model_stops_after_the_last_wanted_site(family: str, layers: int) -> None:
    model = load(family)
    assert len(model.layers) == layers
    ran: list[int] = []
    for layer in model.layers:
        layer.envoy._module.register_forward_pre_hook(lambda *_, index=layer.index: ran.append(index))
    for last in range(layers):
        ran.clear()
        capture(model, ROWS, f"layers.{last}.resid_pre" if last else "layers.0.resid_post")
        assert ran == list(range(last + 1)), last
    ran.clear()
    capture(model, ROWS, "logits")
    assert ran == list(range(layers))


def test_other_tools_names_layer_stars_and_negative_layers(mamba2: cb.Model) -> None:
    assert resolve(mamba2, "layers.-1.H3") == ["layers.1.ssm.y"]
    assert resolve(mamba2, ["layers.1.residual", "layers.0.H1"]) == ["layers.0.ssm.gated", "layers.1.resid_post"]
    assert resolve(mamba2, "layers.*.z") == ["layers.0.ssm.gate", "layers.1.ssm.gate"]
    names = {
        "H1": "ssm.gated", "H2": "ssm.in_proj", "H3": "ssm.y", "H4": "ssm.state", "H5": "ssm.conv",
        "out_proj_in": "ssm.gated", "x_proj": "ssm.in_proj", "ssm_y": "ssm.y", "hidden_state_h": "ssm.state",
        "conv1d": "ssm.conv", "A_bar": "ssm.decay", "out_proj_out": "ssm.out", "residual": "resid_post",
    }  # fmt: skip
    for other, ours in names.items():
        assert resolve(mamba2, f"layers.0.{other}") == [f"layers.0.{ours}"]
    assert list(capture(mamba2, ROWS[:1], "layers.0.H3")) == ["layers.0.ssm.y"]
    jamba = load("jamba")
    assert resolve(jamba, "layers.*.ssm.y") == ["layers.0.ssm.y", "layers.2.ssm.y"]  # where there is one


def test_every_kind_of_attention_reads_its_pattern_when_loaded_by_name() -> None:
    got = capture(cb.load_model("random:llama"), ROWS[:1], "layers.*.attn.pattern")
    assert [value.shape for value in got.values()] == [(1, 4, 9, 9)] * 2
