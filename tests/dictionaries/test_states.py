"""Rows of states are what capture reads; a substituted write is what writing it there does."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import circuitbench as cb
from circuitbench.dictionaries import Dictionary, build, from_weights
from circuitbench.dictionaries.matrix_atoms import Rank1
from circuitbench.dictionaries.states import state_rows, train_state_sae
from circuitbench.dictionaries.substitution import replacements, substitution
from circuitbench.errors import BadInput
from circuitbench.models import Model

HEADS = {"random:mamba2": 1, "random:mamba": None, "random:qwen3_next": 2}  # SSD, S6, gated delta


@pytest.fixture(scope="module", params=HEADS)
def model(request: pytest.FixtureRequest) -> tuple[Model, int | None]:
    return cb.load_model(request.param, dtype=torch.float64), HEADS[request.param]


def ids(rows: int = 3, length: int = 12) -> Tensor:
    return torch.randint(5, 60, (rows, length), generator=torch.Generator().manual_seed(0))


def text(rows: int = 3, length: int = 12) -> Tensor:
    """The same tokens as one document, which is cut into these rows again."""
    return ids(rows, length).flatten()


def exact(d_in: int, site: str, head: int | None) -> Dictionary:
    """A dictionary whose reconstruction is its input: x = relu(x) − relu(−x)."""
    both = torch.cat([torch.eye(d_in), -torch.eye(d_in)]).double()
    made = from_weights("topk", W_enc=both.T, W_dec=both, k=d_in)
    made.site, made.metadata = site, {"head": head}
    return made


@pytest.mark.parametrize("name", ["write", "state"])
def test_rows_are_the_captured_matrices(model: tuple[Model, int | None], name: str) -> None:
    loaded, head = model
    site = f"layers.0.ssm.{name}"
    found = state_rows(loaded, site, text(4, 10), head=head, positions_per_sequence=3, context=10, seed=5)
    whole = cb.capture(loaded, ids(4, 10), site)[site]
    whole = whole if head is None else whole[:, :, head]
    assert found.rows.shape == (12, whole[0, 0].numel())
    assert found.shape == whole.shape[2:]
    assert (found.sequence.bincount() == 3).all()
    assert torch.allclose(found.rows, whole[found.sequence, found.position].flatten(1).float(), atol=1e-6)
    assert len(set(zip(found.sequence.tolist(), found.position.tolist(), strict=True))) == 12
    again = state_rows(loaded, site, text(4, 10), head=head, positions_per_sequence=3, context=10, seed=5)
    assert torch.equal(again.position, found.position)
    every = state_rows(loaded, site, text(4, 10), head=head, context=10)
    assert torch.allclose(every.rows, whole.flatten(0, 1).flatten(1).float(), atol=1e-6)


def test_a_write_is_an_outer_product(model: tuple[Model, int | None]) -> None:
    loaded, head = model
    found = state_rows(loaded, "layers.0.ssm.write", text(), head=head, context=12)
    singular = torch.linalg.svdvals(found.rows.view(-1, *found.shape).double())
    assert (singular[:, 1] < 1e-5 * singular[:, 0].clamp_min(1e-12)).all()


def test_substitution_is_writing_there(model: tuple[Model, int | None]) -> None:
    loaded, head = model
    site, positions = "layers.0.ssm.write", [0, 5, 11]
    found = state_rows(loaded, site, text(1), head=head, context=12)
    made = build("topk", d_in=found.rows.shape[1], d_dict=40, k=3, seed=1, dtype=torch.float64)
    with torch.no_grad():
        made.b_dec.copy_(found.rows.mean(0))
    made.site, made.metadata = site, {"head": head}
    result = substitution(loaded, made, ids(1), positions=positions, batch_size=2, seed=4)
    assert result.position.tolist() == positions
    clean = loaded.hf(ids(1)).logits.double().log_softmax(-1)[0]
    held = cb.capture(loaded, ids(1), site)[site][0, positions]
    held = (held if head is None else held[:, head]).flatten(1)
    instead = replacements(made, held, held[0], found.shape, torch.Generator())[2]
    code = made.encode(held)
    assert torch.allclose(instead["atom"], code.amax(1, keepdim=True) * made.W_dec[code.argmax(1)])
    for name in ("deletion", "atom", "code"):
        for i, t in enumerate(positions):
            value = instead[name][i].view(found.shape if head is None else (1, *found.shape))
            write = cb.Set(site, value, positions=[t], heads=head)
            changed = cb.intervene(loaded, ids(1), write).logits.double().log_softmax(-1)[0, t:]
            p = clean[t:]
            kl = (p.exp() * (p - changed)).sum(-1).mean()
            assert result.kl[name][i].item() == pytest.approx(kl.item(), rel=1e-6), (name, i)
    assert result.kl_deletion.min() > 1e-12  # there was something to see


@pytest.mark.parametrize("name", ["write", "state"])
def test_an_exact_dictionary_changes_nothing(model: tuple[Model, int | None], name: str) -> None:
    loaded, head = model
    site = f"layers.1.ssm.{name}"
    found = state_rows(loaded, site, text(1, 4), head=head, context=4)
    result = substitution(loaded, exact(found.rows.shape[1], site, head), ids(2), n_positions=3, horizon=4)
    assert result.prompt.tolist() == [0, 0, 0, 1, 1, 1]
    assert result.kl_code.abs().max() < 1e-6 * result.kl_deletion.max() + 1e-14
    assert result.wins("deletion") == 0.0
    assert str(result).count("\n") == 6


def test_a_state_dictionary_is_trained_and_knows_where_it_belongs(model: tuple[Model, int | None]) -> None:
    loaded, head = model
    made = train_state_sae(
        loaded, "layers.0.ssm.write", ids(8, 16), head=head, d_dict=32, k=4, steps=60, batch_size=64, progress=False
    )
    assert isinstance(made, Rank1)
    assert (made.site, made.metadata["head"]) == ("layers.0.ssm.write", head)
    rows = state_rows(loaded, "layers.0.ssm.write", ids(8, 16), head=head).rows
    error, variance = (rows - made(rows)).pow(2).sum(), (rows - rows.mean(0)).pow(2).sum()
    assert error < 0.9 * variance
    result = substitution(loaded, made, ids(1), n_positions=2)
    assert (result.activation > 0).all()
    vectors = train_state_sae(
        loaded, "layers.0.ssm.state", ids(8, 16), atoms="vector", kind="batchtopk", d_dict=16, k=2, steps=3,
        batch_size=8, progress=False,
    )  # fmt: skip
    assert vectors.kind == "batchtopk"
    assert vectors.d_in == cb.capture(loaded, ids(1, 2), "layers.0.ssm.state")["layers.0.ssm.state"][0, 0].numel()


def test_what_is_refused() -> None:
    mamba2, mamba = cb.load_model("random:mamba2"), cb.load_model("random:mamba")
    with pytest.raises(BadInput, match="has 4 heads with a matrix each; say which, head=0 to head=3"):
        train_state_sae(mamba2, "layers.0.ssm.write", ids(), d_dict=8)
    with pytest.raises(BadInput, match="head=4 is not among them"):
        state_rows(mamba2, "layers.0.ssm.write", ids(), head=4)
    with pytest.raises(BadInput, match="has no heads"):
        state_rows(mamba, "layers.0.ssm.write", ids(), head=0)
    with pytest.raises(BadInput, match=r"takes a recurrent state that is a matrix"):
        state_rows(mamba2, "layers.0.ssm.y", ids())
    with pytest.raises(BadInput, match="do not fit into memory_gib"):
        state_rows(mamba2, "layers.0.ssm.write", ids(), memory_gib=1e-6)
    with pytest.raises(BadInput, match="goes with atoms="):
        train_state_sae(mamba2, "layers.0.ssm.write", ids(), head=0, kind="topk", d_dict=8)
    with pytest.raises(BadInput, match="d_in = 12, and head 1 of layers.0.ssm.write has 128 numbers"):
        substitution(mamba2, exact(12, "layers.0.ssm.write", 1), ids())
    made = exact(128, "layers.0.ssm.write", 1)
    with pytest.raises(BadInput, match="positions 0 to 11"):
        substitution(mamba2, made, ids(), positions=[12])
    with pytest.raises(BadInput, match="give one of them"):
        substitution(mamba2, made, ids(), positions=[1], n_positions=2)
