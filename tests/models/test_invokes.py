"""Several prompts in one trace: each block reads and writes the rows of its own, whatever the others do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import circuitbench as cb
from circuitbench.tracing import capture
from circuitbench.tracing.addresses import axes_by_address, read_site
from tests.architectures.cases import FAMILIES, RNN, S6, load, prompts, relative

LONG, SHORT = prompts(9, 6)
ANOTHER = prompts(9, seed=1)[0]


def text(ids: list[int]) -> str:
    """A prompt as nnsight takes it: a string for the tokenizer of token ids."""
    return " ".join(map(str, ids))


def second_of(model: cb.Model) -> list[int]:
    """The prompt of the second block: shorter, where padding is masked."""
    return ANOTHER if model.architecture in RNN else SHORT


def real(model: cb.Model, site: str, value: Tensor, length: int) -> Tensor:
    """A padded site's last `length` positions, where the prompt's own tokens are."""
    for axis, name in enumerate(axes_by_address(model, site)):
        if name == "t":
            value = value.narrow(axis, value.shape[axis] - length, length)
    return value


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest) -> cb.Model:
    return load(request.param)


def test_every_site_gives_each_block_its_own_rows(model: cb.Model) -> None:
    sites = [site for site in model.sites if site != "logits" and "channels" not in axes_by_address(model, site)]
    with torch.no_grad():
        with model.trace() as tracer:
            with tracer.invoke(text(LONG)):
                first = {site: read_site(model, site).clone() for site in sites}.save()
            with tracer.invoke(text(second_of(model))):
                second = {site: read_site(model, site).clone() for site in sites}.save()
    for ids, found in ((LONG, first), (second_of(model), second)):
        alone = capture(model, [ids], sites)
        for site in sites:
            got = real(model, site, found[site], len(ids))
            assert got.shape == alone[site].shape, site
            assert relative(got, alone[site]) < 1e-5, site


@pytest.mark.parametrize("in_place", [True, False])
def test_a_write_in_one_block_leaves_the_other_prompt_alone(model: cb.Model, in_place: bool) -> None:
    names = [
        name for name in model.layers[0].sites if name.endswith(("ssm.y", "ssm.x", "ssm.gated", "attn.z", "mlp.out"))
    ]
    for name in [*names, "resid_post"]:
        part, _, site = f"layer.{name}".rpartition(".")
        owner: Any = model.layers[0] if part == "layer" else getattr(model.layers[0], part.removeprefix("layer."))
        with torch.no_grad():
            with model.trace() as tracer:
                with tracer.invoke(text(LONG)):
                    if in_place:
                        getattr(owner, site)[:, -4:] *= 0.5
                    else:
                        value = getattr(owner, site)
                        setattr(owner, site, torch.cat([value[:, :-4], value[:, -4:] * 0.5], 1))
                    edited = model.logits.save()
                with tracer.invoke(text(second_of(model))):
                    untouched = model.logits.save()
            with model.trace() as tracer:
                with tracer.invoke(text(LONG)):
                    plain = model.logits.save()
                with tracer.invoke(text(second_of(model))):
                    expected = model.logits.save()
        assert relative(real(model, "logits", untouched, 6), real(model, "logits", expected, 6)) < 1e-6, name
        alone = cb.intervene(model, [LONG], cb.Scale(f"layers.0.{name}", 0.5, positions=slice(-4, None)))
        assert relative(edited, alone.logits) < 1e-5, name
        assert relative(edited, plain) > 3e-5, name


def test_eight_prompts_on_a_model_with_eight_heads() -> None:
    """nnsight would narrow every tensor whose first axis has the size of the batch: A, D, dt_bias are (8,)."""
    model = load("mamba2-many-groups")
    rows = prompts(*[7] * 8)
    sites = [site for site in model.layers[0].sites if site.startswith("ssm.")]
    with torch.no_grad():
        with model.trace() as tracer:
            found = [].save()
            for ids in rows:
                with tracer.invoke(text(ids)):
                    found.append({site: read_site(model, f"layers.0.{site}").clone() for site in sites})
    for ids, got in zip(rows, found, strict=True):
        alone = capture(model, [ids], [f"layers.0.{site}" for site in sites])
        for site in sites:
            assert got[site].shape[0] == 1
            assert relative(got[site], alone[f"layers.0.{site}"]) < 1e-5, site


@pytest.mark.parametrize("family", [*S6, "mamba2", "qwen3_next"])
def test_each_block_edits_its_own_recurrence(family: str) -> None:
    """A state edit, an operand and y, each by another block; a fourth block asks for nothing of the scan."""
    model, rows = load(family), prompts(7, 7, 7, 7)
    ssm, site = model.layers[0].ssm, "layers.0.ssm"
    with torch.no_grad():
        with model.trace() as tracer:
            with tracer.invoke(text(rows[0])):
                ssm.edit_state({3: torch.zeros_like})
                first = model.logits.save()
            with tracer.invoke(text(rows[1])):
                ssm.x[:, 2] = 0
                second = model.logits.save()
            with tracer.invoke(text(rows[2])):
                ssm.y[:, 4] = 0
                third = model.logits.save()
            with tracer.invoke(text(rows[3])):
                fourth = model.logits.save()
    edits: list[Any] = [cb.Set(f"{site}.state", 0.0, 3), cb.Set(f"{site}.x", 0.0, 2), cb.Set(f"{site}.y", 0.0, 4), []]
    for ids, got, edit in zip(rows, (first, second, third, fourth), edits, strict=True):
        alone = cb.intervene(model, [ids], edit)
        assert relative(got, alone.logits) < 1e-5, edit


@pytest.mark.parametrize("family", ["mamba", "mamba2", "falcon_h1", "llama"])
def test_one_block_hands_a_tensor_to_another(family: str) -> None:
    model, rows = load(family), prompts(7, 7)
    part, name = (model.layers[0].ssm, "y") if family != "llama" else (model.layers[0].attn, "z")
    with torch.no_grad():
        with model.trace() as tracer:
            barrier = tracer.barrier(2)
            with tracer.invoke(text(rows[0])):
                given = getattr(part, name)[:, -1].clone()
                barrier()
            with tracer.invoke(text(rows[1])):
                own = getattr(part, name)
                barrier()
                own[:, -1] = given
                got = model.logits.save()
    address = f"layers.0.{'attn' if family == 'llama' else 'ssm'}.{name}"
    value = capture(model, [rows[0]], address)[address][:, -1]
    alone = cb.intervene(model, [rows[1]], cb.Set(address, value[:, None], positions=-1))
    assert alone.delta_norm > 1e-2
    assert relative(got, alone.logits) < 1e-5


def test_gradients_stay_within_their_block() -> None:
    model, rows = load("mamba"), prompts(7, 7)
    with model.trace() as tracer:
        with tracer.invoke(text(rows[0])):
            y = model.layers[0].ssm.y
            first = torch.autograd.grad(model.logits[:, -1].square().sum(), y, retain_graph=True)[0].save()
        with tracer.invoke(text(rows[1])):
            y2 = model.layers[0].ssm.y
            second = torch.autograd.grad(model.logits[:, -1].square().sum(), y2)[0].save()
    for ids, got in zip(rows, (first, second), strict=True):
        with model.trace(text(ids)):
            y = model.layers[0].ssm.y
            alone = torch.autograd.grad(model.logits[:, -1].square().sum(), y)[0].save()
        assert relative(got, alone) < 1e-5
