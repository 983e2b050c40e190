"""The module that SAELens would hook gives the tensor that the site holds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import circuitbench as cb
from circuitbench.dictionaries.formats import hook_names
from circuitbench.errors import SiteNotFound
from tests.dictionaries.examples import example


@pytest.fixture(scope="module")
def model() -> cb.Model:
    return cb.load_model("random:bamba")


def test_a_hook_on_the_module_sees_what_the_site_holds(model: cb.Model) -> None:
    ids = torch.arange(12).reshape(2, 6)
    named = {address: hook_names.hook_name(model, address) for address in model.sites}
    hooked = {address: name for address, name in named.items() if name is not None}
    seen: dict[str, torch.Tensor] = {}

    def keep(name: str):
        def hook(_module: object, _inputs: object, output: object) -> None:
            seen[name] = (output[0] if isinstance(output, tuple) else output).detach().clone()

        return hook

    handles = [model.hf.get_submodule(name).register_forward_hook(keep(name)) for name in set(hooked.values())]
    with torch.no_grad():
        model.hf(ids)
    for handle in handles:
        handle.remove()
    held = cb.capture(model, ids, list(hooked))
    for address, name in hooked.items():
        torch.testing.assert_close(held[address], seen[name])
    assert {"layers.0.resid_post", "layers.0.ssm.out"} <= hooked.keys()
    assert named["layers.0.ssm.gated"] is None, "it is an input"
    assert all(named[address] is None for address in named if address.endswith(("ssm.state", "ssm.y", "ssm.write")))


def test_a_dictionary_is_saved_with_the_names_of_both(model: cb.Model, tmp_path: Path) -> None:
    """SAELens' name where it has one, else our address; our sites come back."""
    for site, named in (("layers.0.ssm.out", "model.layers.0.mamba"), ("layers.0.ssm.gated", "layers.0.ssm.gated")):
        dictionary = example("standard", d_out=4)
        dictionary.site, dictionary.site_out = site, "layers.1.resid_post"
        hook_names.record(dictionary, model)
        dictionary.save(tmp_path)
        told = json.loads((tmp_path / "cfg.json").read_text())["metadata"]
        assert (told["hook_name"], told["hook_name_out"]) == (named, "model.layers.1")
        found = cb.load_dictionary(tmp_path)
        assert (found.site, found.site_out, found.metadata) == (site, "layers.1.resid_post", dictionary.metadata)


def test_a_site_that_is_not_there(model: cb.Model) -> None:
    with pytest.raises(SiteNotFound):
        hook_names.hook_name(model, "layers.0.ssm.nothing")
