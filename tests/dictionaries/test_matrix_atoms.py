"""Rank-1 matrix atoms: planted ones are found; values and gradients are those of the dense products."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from circuitbench.dictionaries import build, from_weights, load_dictionary, train
from circuitbench.dictionaries.base import Step
from circuitbench.dictionaries.matrix_atoms import Rank1, outer
from circuitbench.errors import BadInput

SHAPE = (6, 5)
OPTIONS = {"auxk_weight": 1 / 32}


def a_dictionary(dtype: torch.dtype = torch.float64) -> Rank1:
    """With an encoder that is not the decoder, and biases."""
    made = build("rank1", d_in=30, d_dict=24, k=4, shape=SHAPE, unit_rows=False, dtype=dtype, seed=3)
    assert isinstance(made, Rank1)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return made


def matrices(n: int = 40) -> Tensor:
    return torch.randn(n, *SHAPE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def by_hand(made: Rank1, S: Tensor) -> tuple[Tensor, Tensor]:
    """Code and reconstruction, feature by feature, from the formulas alone."""
    U_enc, V_enc, b_enc, U, V, b_dec = (
        made.U_enc, made.V_enc, made.b_enc, made.U_dec, made.V_dec, made.b_dec.view(SHAPE)
    )  # fmt: skip
    scores = torch.stack([((S - b_dec) @ v) @ u + b for u, v, b in zip(U_enc, V_enc, b_enc, strict=True)], 1)
    kept = torch.zeros_like(scores).scatter(1, scores.topk(made.k, 1).indices, 1.0)
    code = (scores * kept).relu()
    back = b_dec + sum(code[:, i, None, None] * torch.outer(U[i], V[i]) for i in range(len(U)))
    assert isinstance(back, Tensor)
    return code, back


def test_code_and_reconstruction_are_the_bilinear_forms() -> None:
    made, S = a_dictionary(), matrices()
    code, back = by_hand(made, S)
    x = S.flatten(1)
    assert torch.allclose(made.encode(x), code, atol=1e-12)
    assert torch.allclose(made(x), back.flatten(1), atol=1e-12)
    assert torch.allclose(made.decode(made.encode_sparse(x)), back.flatten(1), atol=1e-12)
    assert torch.linalg.matrix_rank(made.W_dec[7].view(SHAPE)) == 1
    assert sum(p.numel() for p in made.parameters()) == 24 * (2 * (6 + 5) + 1) + 30


def test_outer_products_are_encoded_from_their_factors() -> None:
    made, generator = a_dictionary(), torch.Generator().manual_seed(2)
    left, right = (torch.randn(20, size, generator=generator, dtype=torch.float64) for size in SHAPE)
    assert torch.allclose(made.encode_outer(left, right), made.encode(outer(left, right)), atol=1e-12)


@pytest.mark.parametrize("dead", [[], [0, 5, 9]])
def test_gradients_are_those_of_dense_autograd(dead: list[int]) -> None:
    made, S = a_dictionary(), matrices()
    x, dead_features = S.flatten(1), torch.tensor(dead, dtype=torch.long)
    objective = made.objective(x, x, Step(0.0, dead_features, OPTIONS))
    found = torch.autograd.grad(objective.loss, list(made.parameters()))
    _, back = by_hand(made, S)
    loss = (S - back).pow(2).sum((1, 2)).mean() / made.d_in
    if dead:
        left_over = (S - back).detach()
        b_dec = made.b_dec.view(SHAPE)
        estimate = torch.zeros_like(S)
        for i in dead:
            score = ((S - b_dec) @ made.V_enc[i]) @ made.U_enc[i] + made.b_enc[i]
            estimate = estimate + score.relu()[:, None, None] * torch.outer(made.U_dec[i], made.V_dec[i])
        variance = (left_over - left_over.mean(0)).pow(2).sum()
        loss = loss + (left_over - estimate).pow(2).sum() / variance / 32
    expected = torch.autograd.grad(loss, list(made.parameters()))
    assert objective.loss.item() == pytest.approx(loss.item(), rel=1e-12)
    for (name, _), ours, theirs in zip(made.named_parameters(), found, expected, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-12), name


def test_planted_atoms_are_recovered() -> None:
    generator = torch.Generator().manual_seed(0)
    U, V = (F.normalize(torch.randn(16, size, generator=generator), dim=1) for size in (8, 6))
    atoms = outer(U, V)
    weights = (torch.rand(3_000, 16, generator=generator) < 3 / 16) * (0.5 + torch.rand(3_000, 16, generator=generator))
    rows = 7.0 * (weights @ atoms + 0.3 * torch.randn(48, generator=generator))
    found = train(
        rows, kind="rank1", shape=(8, 6), k=3, d_dict=32, steps=200, batch_size=128, progress=False
    ).dictionary
    assert torch.allclose(found.W_dec.norm(dim=1), torch.ones(32), atol=1e-5)
    best = (atoms @ found.W_dec.T).amax(1)
    assert (best > 0.95).all(), best.min()
    # the scale is folded in: activations are in the units of the rows
    assert (rows - found(rows)).pow(2).sum() / (rows - rows.mean(0)).pow(2).sum() < 0.25


@pytest.mark.parametrize("fold", ["decoder_norm", "scale"])
def test_folding_keeps_the_function(fold: str) -> None:
    made, x = a_dictionary(), matrices().flatten(1)
    with torch.no_grad():
        before = made(x), made.encode(x)
        norms = made.W_dec.norm(dim=1)
        if fold == "scale":
            made.fold_scale(torch.tensor(0.1), torch.tensor(0.1))
            assert torch.allclose(made(x * 0.1), before[0] * 0.1, atol=1e-12)
            assert torch.allclose(made.encode(x * 0.1), before[1] * 0.1, atol=1e-12)
        else:
            made.k = made.d_dict  # which k are largest does depend on the lengths
            before = made(x), made.encode(x)
            made.fold_decoder_norm()
            assert torch.allclose(made(x), before[0], atol=1e-12)
            assert torch.allclose(made.encode(x), before[1] * norms, atol=1e-12)
            assert torch.allclose(made.W_dec.norm(dim=1), torch.ones(24, dtype=torch.float64))


def test_comes_back_from_its_folder(tmp_path: Path) -> None:
    made = a_dictionary(torch.float32).requires_grad_(False)
    made.site, made.metadata = "layers.2.ssm.write", {"head": 1}
    made.save(tmp_path)
    again = load_dictionary(tmp_path)
    assert isinstance(again, Rank1)
    assert (again.kind, again.settings, again.site, again.metadata) == ("rank1", made.settings, made.site, {"head": 1})
    x = matrices().flatten(1).float()
    assert torch.equal(again(x), made(x))


def test_unit_rows_make_it_homogeneous_and_all_rows_count_the_same() -> None:
    plain = a_dictionary()
    made = build("rank1", d_in=30, d_dict=24, k=4, shape=SHAPE, unit_rows=True, dtype=torch.float64)
    assert isinstance(made, Rank1)
    with torch.no_grad():
        plain.b_dec.zero_()
        made.load_state_dict(plain.state_dict())
    x = matrices().flatten(1) * torch.logspace(-3, 3, 40, dtype=torch.float64)[:, None]
    size = x.pow(2).mean(1, keepdim=True).sqrt()
    unit = x / size
    assert torch.allclose(made.encode(7.0 * x), 7.0 * made.encode(x), rtol=1e-10)
    assert torch.allclose(made(x), plain(unit) * size, rtol=1e-10)
    step = Step(0.0, torch.tensor([0, 5]), OPTIONS)
    ours, theirs = made.objective(x, x, step), plain.objective(unit, unit, step)
    assert ours.loss.item() == pytest.approx(theirs.loss.item(), rel=1e-12)
    assert torch.allclose(ours.reconstruction, made(x), rtol=1e-10)
    gradient = torch.autograd.grad(ours.loss, made.V_enc)[0]
    assert torch.allclose(gradient, torch.autograd.grad(theirs.loss, plain.V_enc)[0], atol=1e-12)
    before = made(x)
    made.fold_scale(torch.tensor(3.0), torch.tensor(3.0))
    assert torch.equal(made(x), before)
    left, right = (torch.randn(20, size, generator=torch.Generator().manual_seed(2)).double() for size in SHAPE)
    assert torch.allclose(made.encode_outer(left, right), made.encode(outer(left, right)), atol=1e-12)
    trained = train(
        x.float(), kind="rank1", shape=SHAPE, unit_rows=True, k=2, d_dict=8, steps=3, batch_size=16, progress=False
    ).dictionary
    assert (trained.b_dec == 0).all()


def test_what_it_cannot_be() -> None:
    x = matrices().flatten(1)
    with pytest.raises(BadInput, match=r"shape=\(6, 6\).*rows . cols = d_in"):
        build("rank1", d_in=30, d_dict=8, k=2, shape=(6, 6), unit_rows=False)
    with pytest.raises(BadInput, match="takes the settings k, shape, unit_rows"):
        train(x, kind="rank1", k=2, d_dict=8, progress=False)
    with pytest.raises(BadInput, match="needs another kind"):
        train(x, x, kind="rank1", shape=SHAPE, k=2, d_dict=8, progress=False)
    with pytest.raises(BadInput, match="tangent"):
        train(x, kind="rank1", shape=SHAPE, k=2, d_dict=8, steps=2, decoder_norm="tangent", progress=False)
    made = a_dictionary()
    with pytest.raises(BadInput, match="has no W_enc|no W_enc"):
        from_weights("rank1", W_enc=made.W_enc, W_dec=made.W_dec, k=4, shape=SHAPE, unit_rows=False)
