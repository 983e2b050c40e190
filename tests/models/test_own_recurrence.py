"""A recurrence and a model of one's own: mapped without a class, checked, edited, and told when wrong.

The model's memory has two layers, starts from one that was learned, and takes gradient steps: y is linear in nothing.
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import nnsight
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

import circuitbench as cb
from circuitbench import recurrences
from circuitbench.architectures import ARCHITECTURES, Architecture, FunctionScan, Part, Site
from circuitbench.architectures.scans import SSDScan
from circuitbench.models.random import random_model
from tests.ndif.plugin import NdifServer, save_for_server
from tests.recurrences.stepwise_cases import DEEP, STEPWISE

nnsight.register("tests.models.test_own_recurrence")  # what is defined here is not on the server
nnsight.register("tests.recurrences.stepwise_cases")


def learn(key, query, value, rate, keep, memory, skip):
    """The memory's own loop, its slopes by autograd: outputs, and the memory at the end."""
    out = []
    for t in range(key.shape[1]):
        with torch.enable_grad():
            W, V = (M.detach().requires_grad_() if not M.requires_grad else M for M in memory.unbind(1))
            said = torch.einsum("bm,bmv->bv", torch.tanh(torch.einsum("bk,bkm->bm", key[:, t], W)), V)
            loss = (said - value[:, t]).square().sum() / 2
            slopes = torch.autograd.grad(loss, [W, V], create_graph=True)
        memory = keep[:, t, None, None, None] * memory - rate[:, t, None, None, None] * torch.stack(slopes, 1)
        W, V = memory.unbind(1)
        out.append(torch.einsum("bm,bmv->bv", torch.tanh(torch.einsum("bk,bkm->bm", query[:, t], W)), V))
    return torch.stack(out, 1) + skip * value, memory


class Learner(nn.Module):
    def __init__(self, config):
        super().__init__()
        size = config.hidden_size
        self.key, self.query, self.value, self.merge = (nn.Linear(size, size, bias=False) for _ in range(4))
        self.rates = nn.Linear(size, 2)
        self.start = nn.Parameter(torch.randn(2, size, size) / size)
        self.skip = nn.Parameter(torch.rand(size))

    def forward(self, hidden_states):
        rate, keep = torch.sigmoid(self.rates(hidden_states)).unbind(-1)
        real = (hidden_states != 0).any(-1)  # padding is neither learned nor forgotten
        rate, keep = rate * real, torch.where(real, keep, 1.0)
        memory = self.start.expand(len(hidden_states), -1, -1, -1)
        value = self.value(hidden_states)
        y, _ = learn(self.key(hidden_states), self.query(hidden_states), value, rate, keep, memory, skip=self.skip)
        return self.merge(y)


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.norm, self.learner = nn.RMSNorm(config.hidden_size), Learner(config)

    def forward(self, hidden_states, mask):
        return hidden_states + self.learner(self.norm(hidden_states) * mask)


class LearnsConfig(PreTrainedConfig):
    model_type = "learns"
    vocab_size, hidden_size, num_hidden_layers = 31, 6, 2


class Learns(PreTrainedModel, GenerationMixin):
    config_class = LearnsConfig

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids, attention_mask=None, **kwargs):
        hidden_states = self.embed(input_ids)
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        for block in self.blocks:
            hidden_states = block(hidden_states, mask[..., None].to(hidden_states))
        return CausalLMOutput(logits=self.head(self.norm(hidden_states)))


AutoModelForCausalLM.register(LearnsConfig, Learns, exist_ok=True)
ARGUMENTS = {"key": "k", "query": "q", "value": "x", "rate": "rate", "keep": "keep"}
ARGUMENTS |= {"memory": "initial_state", "skip": "D"}
SITES = {
    "resid_pre": Site(":input", base=""),
    "ssm.k": Site("scan:k", "b t d_model"),
    "ssm.q": Site("scan:q", "b t d_model"),
    "ssm.x": Site("scan:x", "b t d_model"),
    "ssm.rate": Site("scan:rate", "b t"),
    "ssm.decay": Site("scan:decay", "b t"),
    "ssm.write": Site("scan:write", "b t 2 d_model d_model"),
    "ssm.state": Site("scan:state", "b t 2 d_model d_model", writable=False),
    "ssm.y": Site("scan:y", "b t d_model"),
    "ssm.gated": Site("merge:input", "b t d_model"),
    "ssm.out": Site(":output"),
    "resid_post": Site(":output", base=""),
}
IDS = torch.tensor([[3, 14, 15, 9, 26, 5], [8, 9, 7, 9, 3, 2]])


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Registers maps and recurrences for one test."""
    monkeypatch.setattr(recurrences, "RECURRENCES", dict(recurrences.RECURRENCES))

    def model(recurrence: recurrences.Stepwise = DEEP, scan: Any = None, sites: Any = SITES) -> cb.Model:
        recurrences.register("deep", recurrence)
        scan = scan or FunctionScan("deep", "/learn_0", ARGUMENTS, returns_state=True)
        parts = {"ssm": Part(("learner",), scan=scan)}
        monkeypatch.setitem(ARCHITECTURES, "learns", Architecture("learns", "blocks", parts, sites, "norm", "head"))
        torch.manual_seed(0)
        hf = Learns(LearnsConfig()).eval()
        for parameter in hf.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.35)
        return cb.load_model(hf)

    return SimpleNamespace(model=model)


def test_a_memory_that_is_linear_in_nothing_passes_every_check(own) -> None:
    model = own.model()
    report = cb.check(model).raise_if_failed()
    assert report.facts["noise"] < 1e-4
    replayed = [row for row in report.rows if row.check == "the scan replayed"]
    assert len(replayed) == 2 and all(row.measured <= 1e-5 for row in replayed)
    (frozen,) = [row for row in report.rows if row.check == "the frozen form closes"]
    assert frozen.ok is None and "not linear in x" in frozen.advice
    moved = {row.site.partition("ssm.")[2] for row in report.rows if row.check == "an edit moves the logits"}
    assert {"k", "q", "x", "rate", "decay", "write", "y", "gated", "out"} <= moved
    with pytest.raises(cb.SiteNotFound, match=r"layers.0.ssm.mixing: layer 0 \(ssm\) has resid_pre, ssm.k"):
        cb.capture(model, IDS, "layers.0.ssm.mixing")
    with pytest.raises(cb.BadInput, match=r"no knockout of this recurrence: its y is not linear in x"):
        cb.intervene(model, IDS, [cb.Knockout("layers.0.ssm", sources=1)])


def test_a_state_that_is_edited_is_what_the_model_goes_on_with(own) -> None:
    # The oracle: the model's own code on the later tokens, from the edited memory as the one it has learned.
    model = own.model()
    cut = model.hf.blocks[1].learner
    with torch.no_grad():
        with model.trace(IDS):
            hidden = model.layers[1].resid_pre.save()
            states = model.layers[1].ssm.edit_state({2: torch.tanh}, when="after_read").save()
            edited = model.layers[1].ssm.out.save()
        rest = model.hf.blocks[1].norm(hidden[:, 3:])
        rate, keep = torch.sigmoid(cut.rates(rest)).unbind(-1)
        y, last = learn(cut.key(rest), cut.query(rest), cut.value(rest), rate, keep, states[:, 2], cut.skip)
    torch.testing.assert_close(edited[:, 3:], cut.merge(y), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(states[:, -1], last, rtol=1e-5, atol=1e-6)


SAID = {"operands": DEEP.operands, "state": DEEP.state, "decay": lambda now: now.keep, "decay_axes": "b"}


def test_a_step_that_is_not_the_models_fails(own) -> None:
    forgets = recurrences.Stepwise(lambda state, now: now.decay * state, DEEP._read, **SAID)
    report = cb.check(own.model(forgets), sites="layers.0.ssm.y")
    assert "the scan replayed" in {row.check for row in report.failed}


def test_a_recurrence_that_is_said_to_be_linear_and_is_not_fails(own) -> None:
    said = recurrences.Stepwise(DEEP._step, DEEP._read, **SAID, linear=True)
    matrix = {"ssm.mixing": Site("scan:mixing by channel", "b channels t t", writable=False)}
    before, after = list(SITES.items())[:8], list(SITES.items())[8:]
    model = own.model(said, sites=dict([*before, *matrix.items(), *after]))
    report = cb.check(model, sites=["layers.0.ssm.mixing", "layers.0.ssm.y"])
    assert {row.check for row in report.failed} == {"the frozen form closes", "mixing times x is y"}


def test_what_is_missing_is_said_in_one_sentence(own) -> None:
    with pytest.raises(cb.UnsupportedModel, match="set write_follows_state = True"):
        own.model(scan=FunctionScan("deep", "/learn_0", ARGUMENTS, returns_state=True, write_follows_state=False))
    with pytest.raises(cb.UnsupportedModel, match=r"no recurrence 'other'; there are .*Add yours with"):
        own.model(scan=FunctionScan("other", "/learn_0", ARGUMENTS))
    fewer = {name: to for name, to in ARGUMENTS.items() if to != "k"}
    model = own.model(scan=FunctionScan("deep", "/learn_0", {**fewer, "keys": "k"}, returns_state=True))
    with pytest.raises(cb.BadInput, match=r"/learn_0 was called without .*: say in FunctionScan"):
        cb.capture(model, IDS, "layers.0.ssm.k")


class OwnSSDScan(SSDScan):
    """Mamba-2's scan, with the recurrence as somebody wrote its step."""

    recurrence = "own_ssd"
    write_follows_state = True


@pytest.fixture(scope="module")
def mamba2(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_for_server(random_model(ARCHITECTURES["mamba2"], vocab_size=257), tmp_path_factory.mktemp("own"))


@pytest.fixture
def shipped_and_own(mamba2: str, own: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[cb.Model, cb.Model]:
    shipped = cb.load_model(mamba2)
    recurrences.register("own_ssd", STEPWISE["ssd"])
    architecture = ARCHITECTURES["mamba2"]
    part = replace(architecture.parts["ssm"], scan=OwnSSDScan())
    monkeypatch.setitem(ARCHITECTURES, "mamba2", replace(architecture, parts={"ssm": part}))
    return shipped, cb.load_model(mamba2)


def test_the_step_of_a_known_recurrence_passes_where_its_cache_is_known(shipped_and_own) -> None:
    report = cb.check(shipped_and_own[1]).raise_if_failed()
    held = {row.check for row in report.rows if row.ok}
    assert {"edit_state equals an edited cache", "mixing times x is y", "the frozen form closes"} <= held


@pytest.mark.parametrize("where", ["here", "local", "server"])
def test_a_recurrence_of_ones_own_travels_with_its_step(shipped_and_own, where: str, request) -> None:
    def run(model: cb.Model, remote: str | bool) -> list[torch.Tensor]:
        with torch.no_grad():
            with model.trace("how does it compute", remote=remote):
                write = model.layers[0].ssm.write.save()
                states = model.layers[0].ssm.edit_state({3: torch.zeros_like}).save()
                decay = model.layers[1].ssm.decay
                decay[:, 5] = 0.5
                y = model.layers[1].ssm.y.save()
                logits = model.logits.save()
        return [write, states, y, logits]

    shipped, own = shipped_and_own
    remote = {"here": False, "local": "local"}.get(where) if where != "server" else served(request)
    for there, here in zip(run(own, remote), run(shipped, False), strict=True):
        torch.testing.assert_close(there, here, rtol=1e-5, atol=1e-6)


def served(request: pytest.FixtureRequest) -> str:
    server: NdifServer = request.getfixturevalue("ndif_server")
    return server.url
