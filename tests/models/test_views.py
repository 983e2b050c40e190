"""The views inside a with-block: what is read is there, what is written reaches the logits, however it is written."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import circuitbench as cb
from circuitbench.tracing.addresses import axes_by_address, read_site, write_site
from tests.architectures.cases import FAMILIES, load, prompts

# Families, and the variants of them that take another path through the model's code.
MODELS = [*FAMILIES, "falcon_h1-no-norm", "granitemoehybrid-no-experts", "zamba2-adapters"]
IDS = torch.tensor(prompts(9, 9))


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest) -> cb.Model:
    return load(request.param)


def writable(model: cb.Model) -> list[str]:
    """All sites that can be assigned."""
    return [site for site in model.sites if not site.endswith((".ssm.state", ".ssm.scale", ".ssm.mixing"))]


def made_anew(model: cb.Model, site: str) -> bool:
    """Whether the site is computed again, for cached positions too, at every step: the keys and values of MLA."""
    return model.architecture == "kimi_linear" and site.endswith((".attn.k", ".attn.v"))


def one_of_each(model: cb.Model) -> list[str]:
    """Of all writable sites, one for each name and kind of layer."""
    chosen: dict[Any, str] = {}
    for site in writable(model):
        _, layer, name = site.split(".", 2) if site.startswith("layers.") else ("", None, site)
        chosen.setdefault((name, layer and model.layers[int(layer)].kind), site)
    return list(chosen.values())


def logits(model: cb.Model, ids: Tensor, block: Callable[[], None] = lambda: None, **inputs: Any) -> Tensor:
    """The model's output after `block` has run in a trace."""
    with torch.no_grad():
        with model.trace(ids, **inputs):
            block()
            out = model.logits.save()
    return out


def changed_columns(model: cb.Model, site: str, value: Tensor) -> Tensor:
    """The part of a site's tensor that the tests edit: some positions, or the only one, and half of the last axis.

    (To halve a whole vector is to do nothing, where a norm follows.)
    """
    columns = value.movedim(axes_by_address(model, site).index("t"), 0)
    columns = columns[2:5] if len(columns) > 1 else columns
    return columns[..., : max(1, columns.shape[-1] // 2)]


def halve_in_place(model: cb.Model, site: str) -> None:
    changed_columns(model, site, read_site(model, site)).mul_(0.5)


def halve_by_assignment(model: cb.Model, site: str) -> None:
    value = read_site(model, site).clone()
    changed_columns(model, site, value).mul_(0.5)
    write_site(model, site, value)


def rewrite(model: cb.Model, site: str) -> None:
    write_site(model, site, read_site(model, site))


def rewrite_a_copy(model: cb.Model, site: str) -> None:
    write_site(model, site, read_site(model, site).clone())


def rewrite_in_place(model: cb.Model, site: str) -> None:
    value = read_site(model, site)
    value[:] = value.clone()


IDENTITIES = [read_site, rewrite, rewrite_a_copy, rewrite_in_place]


@pytest.mark.parametrize("identity", IDENTITIES, ids=lambda f: f.__name__)
def test_writing_back_what_is_there_changes_nothing_to_the_last_bit(model: cb.Model, identity: Any) -> None:
    plain = model.hf(IDS).logits.detach()

    def block() -> None:
        for site in writable(model):
            identity(model, site)

    assert torch.equal(logits(model, IDS, block), plain)
    if identity is rewrite_in_place:  # the one that takes the longest way round, at each site alone
        for site in one_of_each(model):
            assert torch.equal(logits(model, IDS, lambda site=site: identity(model, site)), plain), site


def test_a_write_in_place_is_the_write_by_assignment_and_reaches_the_logits(model: cb.Model) -> None:
    plain = model.hf(IDS).logits.detach()
    for site in one_of_each(model):
        in_place = logits(model, IDS, lambda site=site: halve_in_place(model, site))
        assigned = logits(model, IDS, lambda site=site: halve_by_assignment(model, site))
        torch.testing.assert_close(in_place, assigned, rtol=1e-6, atol=1e-7, msg=site)
        assert not torch.allclose(assigned, plain, rtol=1e-5, atol=1e-6), site
        if not site.endswith("embed"):  # what came before the edited positions cannot know of it
            torch.testing.assert_close(assigned[:, :2], plain[:, :2], rtol=1e-5, atol=1e-5, msg=site)


def decoded(model: cb.Model) -> Tensor:
    """Prompts that can be decoded: transformers mixes several of RWKV-4 into each other."""
    return IDS[:1] if model.architecture == "rwkv" else IDS


class Decoding:
    """One token that continues a cached prompt, again and again from the same cache."""

    def __init__(self, model: cb.Model) -> None:
        self.model, self.ids = model, decoded(model)
        names = {"rwkv": "state", **dict.fromkeys(("mamba", "falcon_mamba", "mamba2", "xlstm"), "cache_params")}
        self.name = names.get(model.architecture, "past_key_values")
        self.cache = None if model.architecture == "recurrent_gemma" else self.prefix()[self.name]

    def prefix(self, **inputs: Any) -> Any:
        with torch.no_grad():
            return self.model.hf(self.ids[:, :-1], use_cache=True, **inputs)

    def again(self) -> Any:
        """A cache of the prefix; RecurrentGemma keeps a part of it on its modules, where it cannot be copied."""
        if self.cache is not None:
            return copy.deepcopy(self.cache)
        cache = DynamicCache(config=self.model.hf.config)
        self.prefix(past_key_values=cache)
        return cache

    def __call__(self, change: Callable[[cb.Model, str], None] | None = None, *sites: str) -> Tensor:
        """The token's logits, after `change` has been made at some sites."""
        inputs: dict[str, Any] = {self.name: self.again(), "use_cache": True}
        if self.model.architecture == "bamba":  # it numbers positions from 0, whatever the cache holds
            inputs["position_ids"] = torch.full((len(IDS), 1), IDS.shape[1] - 1)
        return logits(self.model, self.ids[:, -1:], lambda: [change(self.model, site) for site in sites], **inputs)


def test_while_decoding_too(model: cb.Model) -> None:
    decoding = Decoding(model)
    plain = decoding()
    full = model.hf(decoding.ids).logits.detach()[:, -1:]
    torch.testing.assert_close(plain, full, rtol=1e-4, atol=1e-4)
    for identity in (rewrite, rewrite_a_copy, rewrite_in_place):
        assert torch.equal(decoding(identity, *writable(model)), plain)
    for site in one_of_each(model):
        if made_anew(model, site):
            for halve in (halve_in_place, halve_by_assignment):
                with pytest.raises(cb.BadInput, match=f"{site} cannot be written where the model goes on from a cache"):
                    decoding(halve, site)
            continue
        in_place, assigned = decoding(halve_in_place, site), decoding(halve_by_assignment, site)
        torch.testing.assert_close(in_place, assigned, rtol=1e-6, atol=1e-7, msg=site)
        hidden = (".decay", ".attn.q", ".attn.k", ".moe.router")  # one token may not show them
        if not site.endswith((*hidden, ".write") if model.architecture == "rwkv" else hidden):
            assert not torch.allclose(assigned, plain, rtol=1e-5, atol=1e-6), site


@pytest.mark.parametrize("variant", ["qwen3_5_moe_text", "olmo_hybrid", "kimi_linear", "lfm2"])
def test_the_sites_of_a_decoded_token_are_those_of_the_whole_sequence(variant: str) -> None:
    model = load(variant)
    sites = [site for site in model.sites if not site.endswith((".ssm.mixing", ".attn.pattern"))]
    found: list[dict[str, Tensor]] = []

    def keep(model: cb.Model, *_: str) -> None:
        found.append({site: read_site(model, site).clone() for site in sites})

    Decoding(model)(keep, "all")
    logits(model, IDS, lambda: keep(model))
    alone, whole = found
    for site in sites:
        torch.testing.assert_close(alone[site], whole[site][:, -1:], rtol=1e-4, atol=1e-5, msg=site)


def generating(model: cb.Model, change: Callable[[cb.Model, str], None] | None) -> Tensor:
    """The logits of every step of a generation in which `change` is made to every site at every step."""
    sites = [site for site in writable(model) if site != "logits" and not made_anew(model, site)]
    with torch.no_grad():
        with model.generate(decoded(model), max_new_tokens=3, min_new_tokens=3) as tracer:
            steps = [].save()
            for _ in tracer.iter[:3]:
                for site in sites if change is not None else []:
                    change(model, site)
                steps.append(model.logits[:, -1].clone())
    return torch.stack(steps)


def test_and_at_every_step_of_a_generation(model: cb.Model) -> None:
    plain = generating(model, None)
    assert torch.equal(generating(model, rewrite_in_place), plain)
    assert torch.equal(generating(model, rewrite_a_copy), plain)
    in_place, assigned = generating(model, halve_in_place), generating(model, halve_by_assignment)
    torch.testing.assert_close(in_place, assigned, rtol=1e-5, atol=1e-6)
    assert ((assigned - plain).abs().amax((1, 2)) > 1e-3).all()
