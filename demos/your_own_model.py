"""A model that nobody has mapped: from its code to named sites, verified, in one file.

Run it as it is, offline: ``python demos/your_own_model.py``; or cell by cell.
"""

# %% The model: your code, as you wrote it. A recurrence in a plain loop, with a memory for every head.
from __future__ import annotations

import torch
from torch import nn
from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

import circuitbench as cb
from circuitbench.architectures import Architecture, Part, Site
from circuitbench.architectures.scans import Call, Scan


def remember(value, key, query, rate, fade):
    """h_t = exp(−fade·rate_t)·h_{t−1} + rate_t·value_t⊗key_t, read as h_t·query_t."""
    h, out = 0.0, []
    for t in range(value.shape[1]):
        keep = torch.exp(-fade * rate[:, t])[..., None, None]
        h = keep * h + torch.einsum("bh,bhp,bn->bhpn", rate[:, t], value[:, t], key[:, t])
        out.append(torch.einsum("bhpn,bn->bhp", h, query[:, t]))
    return torch.stack(out, 1)


class Memory(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.heads, self.width, self.size = config.heads, config.hidden_size // config.heads, config.memory
        self.parts = [config.hidden_size, config.hidden_size, self.size, self.size, self.heads]
        self.mix = nn.Linear(config.hidden_size, sum(self.parts), bias=False)
        self.fade = nn.Parameter(torch.linspace(0.1, 2.0, self.heads))
        self.merge = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, hidden_states):
        gate, value, key, query, rate = self.mix(hidden_states).split(self.parts, dim=-1)
        value = value.unflatten(-1, (self.heads, self.width))
        read = remember(value, key, query, nn.functional.softplus(rate), self.fade)
        return self.merge(read.flatten(2) * torch.sigmoid(gate))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.norm, self.memory = nn.RMSNorm(config.hidden_size), Memory(config)

    def forward(self, hidden_states, mask):
        return hidden_states + self.memory(self.norm(hidden_states) * mask)


class RememberConfig(PreTrainedConfig):
    model_type = "remember"
    vocab_size, hidden_size, num_hidden_layers, heads, memory = 97, 32, 3, 4, 8


class Remember(PreTrainedModel, GenerationMixin):
    config_class = RememberConfig

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


AutoModelForCausalLM.register(RememberConfig, Remember)


# %% The map. First the recurrence: it is Mamba-2's (SSD), so we only say what `remember` calls its arguments.
class RememberScan(Scan):
    recurrence = "ssd"
    sequence = step = "/remember_0"  # an operation of the part: nnsight's name, with the number of the call
    operand_names = ("x", "dt", "B", "C")

    def read(self, args, kwargs, decoding):
        value, key, query, rate, fade = args
        operands = {"x": value, "dt": rate, "A": -fade, "B": key.unsqueeze(2), "C": query.unsqueeze(2)}
        return Call(operands, D=None, dtype=value.dtype)

    def pack(self, call, y, state, decoding):
        return y

    def output_y(self, output, decoding):
        return output


# %% Then where everything is. Shapes are written as einops patterns; `dims` says where the sizes of their axes stand.
cb.register_architecture(
    Architecture(
        model_type="remember",
        layers="blocks",
        parts={"ssm": Part(("memory",), dims={"h": "heads", "p": "width", "n": "size"}, scan=RememberScan())},
        sites={
            "resid_pre": Site(":input", base=""),
            "ssm.in_proj": Site("mix:output", "b t proj"),
            "ssm.x": Site("scan:x", "b t h p"),
            "ssm.dt": Site("scan:dt", "b t h"),
            "ssm.B": Site("scan:B", "b t g n"),
            "ssm.C": Site("scan:C", "b t g n"),
            "ssm.decay": Site("scan:decay", "b t h"),
            "ssm.write": Site("scan:write", "b t h p n"),
            "ssm.state": Site("scan:state", "b t h p n", writable=False),
            "ssm.mixing": Site("scan:mixing", "b h t t", writable=False),
            "ssm.y": Site("scan:y", "b t h p"),
            "ssm.gated": Site("merge:input", "b t d_inner"),
            "ssm.out": Site(":output"),
            "resid_post": Site(":output", base=""),
        },
        final_norm="norm",
        unembed="head",
    )
)

# %% Is the map right? Every name is verified on the live model: the scan replayed, edits, gradients' frozen form, …
torch.manual_seed(0)
model = cb.load_model(Remember(RememberConfig()).eval())
print(model)
report = cb.check(model).raise_if_failed()
print(report)

# %% And everything works: here, what the last token's logits owe to the memory after each token (untrained: little).
clean, corrupt = torch.tensor([5, 17, 3, 60, 41, 8]), torch.tensor([5, 17, 44, 60, 41, 8])
effects = cb.patch_effects(model, clean, corrupt, site="ssm.state", metric=cb.logit_diff(11, 30))
for cell in effects.top(3):
    print(f"layer {cell.layer}, position {cell.position}: {cell.value:+.4f}")
