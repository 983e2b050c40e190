"""Branches of a hybrid's layers: features planted in one are found there, and shares add up as variances do."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import circuitbench as cb
from circuitbench.dictionaries import from_weights, train
from circuitbench.dictionaries.branches import measured, separate_branches
from circuitbench.errors import BadInput

SMALL = {"d_dict": 24, "k": 4, "steps": 12, "batch_size": 64, "context": 32, "progress": False}


def text(n: int = 256) -> Tensor:
    return torch.randint(5, 60, (n,), generator=torch.Generator().manual_seed(0))


def directions(n: int, d: int, seed: int) -> Tensor:
    return torch.linalg.qr(torch.randn(d, n, generator=torch.Generator().manual_seed(seed)))[0].T


def planted() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows of three features of the SSM, two of the attention, one of both; the joint directions, and each branch's."""
    generator = torch.Generator().manual_seed(1)
    U, V = directions(4, 16, 2), directions(3, 16, 3)
    zero = torch.zeros(1, 16)
    joint = torch.cat([torch.cat([U[:3], zero.expand(3, 16)], 1), torch.cat([zero.expand(2, 16), V[:2]], 1)])
    joint = F.normalize(torch.cat([joint, torch.cat([U[3:], V[2:]], 1)]), dim=1)
    code = (torch.rand(4000, 6, generator=generator) < 0.12) * (0.5 + torch.rand(4000, 6, generator=generator))
    return code @ joint, joint, U, V


def test_a_trained_joint_dictionary_puts_planted_features_where_they_belong() -> None:
    rows, joint, _, _ = planted()
    result = train(
        {"ssm": rows[:, :16], "attention": rows[:, 16:]}, sites=("ssm", "attention"), d_dict=12, k=2, steps=400,
        batch_size=128, progress=False,
    )  # fmt: skip
    found = result.dictionary
    scales = torch.tensor(found.metadata["block_scales"]).repeat_interleave(16)
    cosines = F.normalize(joint / scales, dim=1) @ F.normalize(found.W_dec / scales, dim=1).T
    best, which = cosines.max(1)
    assert best.min() > 0.95
    share = found.block_norms()[0][which]
    assert (share[:3] > 0.9).all()
    assert (share[3:5] < 0.1).all()
    assert 0.3 < share[5] < 0.7


def test_planted_features_belong_where_they_were_planted() -> None:
    rows, joint, U, V = planted()
    ssm, attention = rows[:, :16], rows[:, 16:]
    found = {
        "ssm": from_weights("topk", W_enc=U.T, W_dec=U, k=4),
        "attention": from_weights("topk", W_enc=V.T, W_dec=V, k=3),
        "joint": from_weights("topk", W_enc=joint.T, W_dec=joint, k=6, blocks={"a": 16, "b": 16}),
    }
    pair = measured(found, ssm, attention, "a", "b", 0.9)
    assert torch.allclose(pair.ssm_share, torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0, 0.5]), atol=1e-5)
    assert pair.features == pytest.approx({"ssm": 3 / 6, "attention": 2 / 6, "shared": 1 / 6})
    assert max(pair.fvu.values()) < 1e-9
    total = ssm + attention

    def variance(x: Tensor) -> float:
        return x.var(0, unbiased=False).sum().item()

    assert pair.variance["ssm"] == pytest.approx(variance(ssm) / variance(total), rel=1e-5)
    covariance = ((ssm - ssm.mean(0)) * (attention - attention.mean(0))).mean(0).sum().item()
    assert pair.variance["shared"] == pytest.approx(2 * covariance / variance(total), rel=1e-4, abs=1e-6)
    assert pair.explained["both"] == pytest.approx(1.0)
    assert pair.explained["joint"] == pytest.approx(1.0)
    assert pair.explained["ssm"] == pytest.approx(1 - variance(attention) / variance(total), rel=1e-5)


@pytest.mark.parametrize("name", ["random:falcon_h1", "random:hymba"])
def test_each_layer_has_three_dictionaries(name: str) -> None:
    model = cb.load_model(name)
    found = separate_branches(model, text(), layers=[1], **SMALL)
    assert len(found.pairs) == 1
    pair = found.pairs[0]
    assert (pair.ssm, pair.attention) == ("layers.1.ssm.out", "layers.1.attn.out")
    assert [one.d_dict for one in pair.dictionaries.values()] == [24, 24, 48]
    assert pair.dictionaries["joint"].settings["k"] == 8
    assert pair.dictionaries["ssm"].site == "layers.1.ssm.out"
    around = ["layers.1.resid_pre", "layers.1.resid_mid"]
    seen = cb.capture(model, text().view(8, 32), [*around, pair.ssm, pair.attention])
    rows = {address: value.flatten(0, 1) for address, value in seen.items()}
    # the sum of the branches is what the layer adds to the residual stream, and the numbers are of these rows
    total = rows[pair.ssm] + rows[pair.attention]
    assert torch.allclose(total, rows["layers.1.resid_mid"] - rows["layers.1.resid_pre"], atol=1e-5)
    for branch, address in (("ssm", pair.ssm), ("attention", pair.attention)):
        x = rows[address]
        back = pair.dictionaries[branch](x)
        spread = (x - x.mean(0)).pow(2).sum()
        assert pair.fvu[branch] == pytest.approx(((x - back).pow(2).sum() / spread).item(), rel=1e-4)
        left = total - back
        left = (left - left.mean(0)).pow(2).sum() / (total - total.mean(0)).pow(2).sum()
        assert pair.explained[branch] == pytest.approx(1 - left.item(), rel=1e-3, abs=1e-4)
    assert sum(pair.features.values()) == pytest.approx(1.0)
    assert json.loads(json.dumps(found.to_dict())) == found.to_dict()
    assert "layers.1.ssm.out + layers.1.attn.out" in str(found)


def test_is_deterministic_and_measures_held_out_text() -> None:
    model = cb.load_model("random:falcon_h1")
    first, again = (separate_branches(model, text(), held_out=text(64), layers=[0], **SMALL) for _ in range(2))
    assert first.to_dict() == again.to_dict()
    assert (first.n_rows, first.held_out) == (64, True)
    assert torch.equal(first.pairs[0].dictionaries["joint"].W_dec, again.pairs[0].dictionaries["joint"].W_dec)


def test_a_feature_put_into_one_branch_is_found_there() -> None:
    """A direction of its own, at random tokens, far stronger than the branches themselves."""
    model = cb.load_model("random:falcon_h1")
    d = model.hf.config.hidden_size
    planted = F.normalize(torch.randn(d, generator=torch.Generator().manual_seed(4)), dim=0)
    site = "layers.1.ssm.out"
    scale = cb.capture(model, text()[None], site)[site].std().item()
    with cb.steer(model, planted, site=site, strength=40 * scale):
        found = separate_branches(model, text(), layers=[1], **SMALL)
    joint = found.pairs[0].dictionaries["joint"]
    mean = joint.b_dec[:d] / joint.b_dec[:d].norm()
    assert (mean @ planted).abs() > 0.95


def test_what_is_refused() -> None:
    hybrid, in_turn = cb.load_model("random:falcon_h1"), cb.load_model("random:jamba")
    with pytest.raises(BadInput, match=r"layers=\[7\] was given; layers \[0, 1\] have both"):
        separate_branches(hybrid, text(), layers=[7], **SMALL)
    with pytest.raises(BadInput, match=r"layers \[0, 2\] have an SSM, \[1, 3\] attention"):
        separate_branches(in_turn, text(), **SMALL)
    with pytest.raises(BadInput, match="two different sites"):
        separate_branches(hybrid, text(), pairs=[("layers.0.ssm.out", "layers.0.ssm.out")], **SMALL)
    with pytest.raises(BadInput, match="above 0.5 up to 1"):
        separate_branches(hybrid, text(), one_sided=0.5, **SMALL)


def test_sites_of_different_layers_and_sizes_can_be_paired() -> None:
    model = cb.load_model("random:jamba")
    found = separate_branches(model, text(), pairs=[("layers.0.ssm.gated", "layers.1.attn.out")], **SMALL)
    assert found.pairs[0].explained == {}
    assert set(found.pairs[0].fvu) == {"ssm", "attention", "joint ssm", "joint attention"}
    assert "layers.0.ssm.gated + layers.1.attn.out" in str(found)
