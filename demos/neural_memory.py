"""A recurrence that nobody has mapped: a Titans-like neural memory, from its code to named sites, edits and features.

The memory is a matrix that learns while the model reads: one step of gradient descent with momentum per token (Behrouz,
Zhong & Mirrokni 2025, arXiv:2501.00663). Run it as it is, offline: ``python demos/neural_memory.py``; or cell by cell.
"""

# %% The model: your code, as you wrote it. The memory M should answer key k with value v, and learns to as it reads.
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

import circuitbench as cb
from circuitbench import dictionaries, recurrences
from circuitbench.architectures import Architecture, FunctionScan, Part, Site

torch.manual_seed(0)
torch.set_num_threads(1)  # all tensors here are tiny


def memorise(query, key, value, theta, eta, alpha):
    """S_t = η·S_{t−1} − θ·∇½‖M_{t−1}ᵀk − v‖² (momentum) and M_t = (1 − α)·M_{t−1} + S_t, read as y_t = M_tᵀq."""
    M = S = torch.zeros_like(key[:, 0, :, :, None] * value[:, 0, :, None])
    theta, eta, alpha, out = theta[..., None, None], eta[..., None, None], alpha[..., None, None], []
    for t in range(value.shape[1]):
        wrong = torch.einsum("bhkv,bhk->bhv", M, key[:, t]) - value[:, t]
        S = eta[:, t] * S - theta[:, t] * torch.einsum("bhk,bhv->bhkv", key[:, t], wrong)
        M = (1 - alpha[:, t]) * M + S
        out.append(torch.einsum("bhkv,bhk->bhv", M, query[:, t]))
    return torch.stack(out, 1)


class Memory(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.heads, self.width, size = config.heads, config.hidden_size // config.heads, config.hidden_size
        self.query, self.key, self.value, self.gate, self.merge = (nn.Linear(size, size, bias=False) for _ in range(5))
        self.rates = nn.Linear(size, 3 * self.heads)

    def forward(self, hidden_states):
        before = F.pad(hidden_states, (0, 0, 1, -1))  # a key is the token before its value, as by a short convolution
        made = self.query(hidden_states), self.key(before), self.value(hidden_states)
        query, key, value = (x.unflatten(-1, (self.heads, self.width)) for x in made)
        theta, eta, alpha = torch.sigmoid(self.rates(hidden_states)).chunk(3, -1)
        gate = torch.sigmoid(self.gate(hidden_states))
        read = memorise(F.normalize(query, dim=-1), F.normalize(key, dim=-1), value, theta, eta, alpha / 8)
        return self.merge(read.flatten(2) * gate)


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.norm, self.memory = nn.RMSNorm(config.hidden_size), Memory(config)

    def forward(self, hidden_states, mask):
        return hidden_states + self.memory(self.norm(hidden_states) * mask)


class NeuralMemoryConfig(PreTrainedConfig):
    model_type = "neural_memory"
    vocab_size, hidden_size, num_hidden_layers, heads = 16, 32, 2, 4


class NeuralMemory(PreTrainedModel, GenerationMixin):
    config_class = NeuralMemoryConfig

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


AutoModelForCausalLM.register(NeuralMemoryConfig, NeuralMemory)

# %% Something to remember: "c5a0h3e1a0c5…", four letters with a digit each, then the letters again. With which digit?
TOKENS = "abcdefgh01234567"


def ids(*texts):
    return torch.tensor([[TOKENS.index(token) for token in text] for text in texts])


def pairs(count):
    """Four (letter, digit) pairs, then the same in another order, `(count, 16)`."""
    told = torch.stack((torch.rand(count, 8).argsort(1)[:, :4], torch.randint(8, 16, (count, 4))), 2)
    again = torch.rand(count, 4, 1).argsort(1).expand(-1, -1, 2)
    return torch.cat((told, told.gather(1, again)), 1).flatten(1)


hf = NeuralMemory(NeuralMemoryConfig())
optimizer = torch.optim.Adam(hf.parameters(), lr=0.01)
for _ in range(70):
    texts = pairs(32)
    loss = F.cross_entropy(hf(texts).logits[:, 8::2].flatten(0, 1), texts[:, 9::2].flatten())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
texts = pairs(500)
right = hf.eval()(texts).logits[:, 8::2].argmax(-1) == texts[:, 9::2]
print(f"It recalls {right.float().mean():.0%} of the digits.\n")


# %% The recurrence is nobody's yet, so write its step. Edits, gradients, the matrix form and the rest come from that.
# The state is all that goes on from token to token: here memory and momentum, beside each other on an axis of size 2.
def step(state, now):
    wrong = torch.einsum("bhkv,bhk->bhv", state[:, :, 0], now.k) - now.x
    M, S = (now.decay * state).unbind(2)
    S = S - now.theta[..., None, None] * torch.einsum("bhk,bhv->bhkv", now.k, wrong)
    return torch.stack((M + S, S), 2)


titans = recurrences.Stepwise(
    step,
    read=lambda state, now: torch.einsum("bhkv,bhk->bhv", state[:, :, 0], now.q),
    operands={"q": "b t h k", "k": "b t h k", "x": "b t h v", "theta": "b t h", "eta": "b t h", "alpha": "b t h"},
    state="b h 2 k v",
    decay=lambda now: torch.stack((1 - now.alpha, now.eta), 2),  # what survives of M and of S
    decay_axes="b h 2",
    linear=True,  # in x, the values: so there is a matrix that says what every token gives to every later one
)
recurrences.register("titans", titans)

# %% The map: which function runs it, and where everything is. Shapes are einops patterns; `dims` says what sizes are.
arguments = {"query": "q", "key": "k", "value": "x", "theta": "theta", "eta": "eta", "alpha": "alpha"}
sizes = {"h": "heads", "k": "width", "v": "width", "d_inner": "config.hidden_size"}
cb.register_architecture(
    Architecture(
        model_type="neural_memory",
        layers="blocks",
        parts={"ssm": Part(("memory",), dims=sizes, scan=FunctionScan("titans", "/memorise_0", arguments))},
        sites={
            "resid_pre": Site(":input", base=""),
            "ssm.gate": Site("gate:output", "b t d_inner"),
            "ssm.q": Site("scan:q", "b t h k"),
            "ssm.k": Site("scan:k", "b t h k"),
            "ssm.v": Site("scan:x", "b t h v"),
            "ssm.theta": Site("scan:theta", "b t h"),
            "ssm.eta": Site("scan:eta", "b t h"),
            "ssm.alpha": Site("scan:alpha", "b t h"),
            "ssm.decay": Site("scan:decay", "b t h 2"),
            "ssm.write": Site("scan:write", "b t h 2 k v"),
            "ssm.state": Site("scan:state", "b t h 2 k v", writable=False),
            "ssm.mixing": Site("scan:mixing", "b h t t", writable=False),
            "ssm.y": Site("scan:y", "b t h v"),
            "ssm.gated": Site("merge:input", "b t d_inner"),
            "ssm.out": Site(":output"),
            "resid_post": Site(":output", base=""),
        },
        final_norm="norm",
        unembed="head",
    )
)

# %% Is it right? Every name is verified on the live model: the step against your loop, edits, gradients, the matrix, …
model = cb.load_model(hf)
print(cb.check(model).raise_if_failed())

# %% Which states is an answer made of? Put in those of a text with another digit, one layer and position at a time.
told, other, asked = "a3c1b7d2", "a5c1b7d2", "abcd"
metric = cb.logit_diff(TOKENS.index("3"), TOKENS.index("5"))
effects = cb.patch_effects(model, ids(told + "a"), ids(other + "a"), site="ssm.state", metric=metric)
print(f"\nAfter {told}a: 3 rather than 5 by {effects.base:+.1f}. What h_t of {other}a does to that, for every t:")
for number, row in enumerate(effects.values.tolist()):
    print(
        f"  layer {number}:  " + "  ".join(f"{token} {effect:+.1f}" for token, effect in zip(told, row, strict=False))
    )
layer = effects.top(1)[0].layer


# %% Edit the memory, with a known right answer: exchange a and b. M′ = P·M, where k_aᵀP = k_bᵀ, k_bᵀP = k_aᵀ.
def answers(logits):
    return ", ".join(f"{letter} {TOKENS[i]}" for letter, i in zip(asked, logits[:, -1].argmax(-1), strict=True))


texts = ids(*(told + letter for letter in asked))
acts = cb.capture(model, texts, [f"layers.{layer}.ssm.k", "logits"])
K = acts[f"layers.{layer}.ssm.k"][0, [1, 3, 5, 7]].transpose(0, 1)  # at the digits: of a, c, b, d; (heads, 4, k)
P = torch.eye(K.shape[-1]) + torch.linalg.pinv(K) @ (K[:, [2, 1, 0, 3]] - K)  # all other directions stay
with torch.no_grad():
    with model.trace(texts):
        model.layers[layer].ssm.edit_state({7: lambda state: torch.einsum("hij,bhsjv->bhsiv", P, state)})
        exchanged = model.logits.save()
print(f"Told {told}, it says:           {answers(acts['logits'])}")
print(f"a and b exchanged in layer {layer}:  {answers(exchanged)}\n")

# %% What is the memory made of? A sparse dictionary of M after four pairs: one vector for each of 3000 texts.
many, site = pairs(3000)[:, :8], f"layers.{layer}.ssm.state"
M = cb.capture(model, many, site, positions=[-1])[site][:, 0, :, 0].flatten(1)
sae = dictionaries.train(M[:2500].clone(), k=4, d_dict=96, steps=300, batch_size=256, progress=False).dictionary
print(f"{sae}: FVU {dictionaries.evaluation.reconstruction(sae, M[2500:]).fvu:.3f} on memories it has not seen.")

# %% What do its features stand for? How often each fires with a pair in memory, and without.
fires = (sae.encode(M) > 0).float()
held = torch.zeros(len(many), 64).scatter(1, many[:, ::2] * 8 + many[:, 1::2] - 8, 1.0)  # which pairs each text tells
with_it, without = fires.T @ held / held.sum(0), fires.T @ (1 - held) / (1 - held).sum(0)
sure, feature_of = (with_it - without).max(0)
a3, a5 = feature_of[3], feature_of[5]  # the number of a pair: 8 · letter + digit
print(f"{(sure > 0.9).sum()} of all 64 pairs have a feature that fires for them alone.")
print(
    f"That of a3 is {a3}: active in {with_it[a3, 3]:.0%} of the memories that hold a3, {without[a3, 3]:.1%} of others."
)


# %% Is a feature a memory, then? Take that of a3 out, put that of a5 in, and ask again.
def believe(state):
    M = state[:, :, 0].flatten(1)
    M = M + sae.encode(M)[:, a3, None] * (sae.W_dec[a5] - sae.W_dec[a3])
    return torch.stack((M.view_as(state[:, :, 0]), state[:, :, 1]), 2)


with torch.no_grad():
    with model.trace(texts):
        model.layers[layer].ssm.edit_state({7: believe})
        believed = model.logits.save()
print(f"Feature {a5} in the place of {a3}:  {answers(believed)}")
