"""RWKV-7 a second time: token by token, head by head, in float64, after the paper (arXiv:2503.14456, section 4).

And the authors' names for the same weights, to write a ``.pth`` file with.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

Weights = Mapping[str, Tensor]


def layer_norm(x: Tensor, weights: Weights, name: str, eps: float) -> Tensor:
    x = (x - x.mean()) / torch.sqrt(((x - x.mean()) ** 2).mean() + eps)
    return x * weights[f"{name}.weight"] + weights.get(f"{name}.bias", 0.0)


def low_rank(x: Tensor, weights: Weights, name: str, middle: Any) -> Tensor:
    inner = middle(weights[f"{name}.lora.0.weight"] @ x)
    return weights[f"{name}.lora.2.weight"] @ inner + weights.get(f"{name}.lora.2.bias", 0.0)


def run(config: Any, weights: Weights, ids: list[int]) -> tuple[Tensor, list[dict[str, Tensor]]]:
    """Logits `(t, vocab)`, and per layer what stands at the sites, each `(t, ...)`."""
    weights = {name: value.detach().double() for name, value in weights.items()}
    eps, heads = config.norm_eps, config.hidden_size // config.head_dim
    size = config.hidden_size
    seen: list[dict[str, list[Tensor]]] = [{} for _ in range(config.num_hidden_layers)]
    time_last = [torch.zeros(size, dtype=torch.float64) for _ in seen]
    channel_last = [torch.zeros(size, dtype=torch.float64) for _ in seen]
    values = weights["model.layers.0.attn.v_proj.weight"].shape[0]
    states = [torch.zeros(heads, values // heads, config.head_dim, dtype=torch.float64) for _ in seen]
    logits = []
    for token in ids:
        x = weights["model.embeddings.weight"][token]
        v_first = torch.zeros(values, dtype=torch.float64)
        for layer in range(config.num_hidden_layers):
            here = f"model.layers.{layer}"
            if f"{here}.pre_norm.weight" in weights:
                x = layer_norm(x, weights, f"{here}.pre_norm", eps)
            before, own = (
                x,
                {name[len(here) + 6 :]: v for name, v in weights.items() if name.startswith(f"{here}.attn.")},
            )
            normed = layer_norm(x, weights, f"{here}.attn_norm", eps)
            last, time_last[layer] = time_last[layer], normed
            mixed = {name: torch.lerp(normed, last, own[f"x_{name}"].flatten()) for name in "rwkvag"}  # equation 3
            r = own["r_proj.weight"] @ mixed["r"]
            w = torch.exp(-math.exp(-0.5) * torch.sigmoid(low_rank(mixed["w"], own, "w_lora", torch.tanh)))
            k = own["k_proj.weight"] @ mixed["k"]
            v = own["v_proj.weight"] @ mixed["v"]
            if layer == 0:
                v_first = v
            else:
                v = torch.lerp(v, v_first, torch.sigmoid(low_rank(mixed["v"], own, "v_lora", lambda u: u)))
            rate = torch.sigmoid(low_rank(mixed["a"], own, "a_lora", lambda u: u))
            gate = low_rank(mixed["g"], own, "g_lora", torch.sigmoid)
            removal = k * own["k_k"]
            k = torch.lerp(k, k * rate, own["k_a"])
            pieces, ys, bonuses = [], [], []
            for h in range(heads):
                keys = slice(h * config.head_dim, (h + 1) * config.head_dim)
                vals = slice(h * (values // heads), (h + 1) * (values // heads))
                unit = removal[keys] / removal[keys].norm()
                # The paper's state has the values' channels first.
                transition = torch.diag(w[keys]) - torch.outer(unit, rate[keys] * unit)
                states[layer][h] = states[layer][h] @ transition + torch.outer(v[vals], k[keys])
                y = states[layer][h] @ r[keys]
                ys.append(y)
                y = (y - y.mean()) / torch.sqrt(((y - y.mean()) ** 2).mean() + config.head_dim * eps)
                y = y * own["g_norm.weight"][vals] + own["g_norm.bias"][vals]
                bonuses.append((r[keys] * k[keys] * own["r_k"][h]).sum() * v[vals])
                pieces.append(y + bonuses[-1])
            gated = torch.cat(pieces) * gate
            out = own["o_proj.weight"] @ gated
            x = x + out
            middle = x
            normed = layer_norm(x, weights, f"{here}.ffn_norm", eps)
            last, channel_last[layer] = channel_last[layer], normed
            hidden = weights[f"{here}.ffn.key.weight"] @ torch.lerp(normed, last, weights[f"{here}.ffn.x_k"])
            hidden = torch.relu(hidden) ** 2
            x = x + weights[f"{here}.ffn.value.weight"] @ hidden
            site = {"resid_pre": before, "resid_mid": middle, "resid_post": x, "ssm.out": out, "ssm.gated": gated}
            site |= {
                "ssm.gate": gate,
                "mlp.hidden": hidden,
                "ssm.y": torch.stack(ys),
                "ssm.bonus": torch.stack(bonuses),
            }
            site |= {"ssm.r": r.view(heads, -1), "ssm.decay": w.view(heads, -1), "ssm.k": k.view(heads, -1)}
            site |= {"ssm.v": v.view(heads, -1), "ssm.v_first": v_first.view(heads, -1)}
            site["ssm.state"] = states[layer].mT.clone()
            for name, value in site.items():
                seen[layer].setdefault(name, []).append(value)
        x = layer_norm(x, weights, "model.norm", eps)
        logits.append(weights["lm_head.weight"] @ x)
    return torch.stack(logits), [{name: torch.stack(v) for name, v in layer.items()} for layer in seen]


def authors_state(weights: Weights) -> dict[str, Tensor]:
    """The same weights as the authors' code saves them."""
    simple = {"attn_norm": "ln1", "ffn_norm": "ln2", "pre_norm": "ln0", "attn.g_norm": "att.ln_x"}
    simple |= {"attn.r_proj": "att.receptance", "attn.k_proj": "att.key", "attn.v_proj": "att.value"}
    simple |= {"attn.o_proj": "att.output", "ffn.key": "ffn.key", "ffn.value": "ffn.value"}
    state = {
        "emb.weight": weights["model.embeddings.weight"],
        "head.weight": weights["lm_head.weight"],
        "ln_out.weight": weights["model.norm.weight"],
        "ln_out.bias": weights["model.norm.bias"],
    }
    for name, value in weights.items():
        if not name.startswith("model.layers."):
            continue
        _, _, layer, rest = name.split(".", 3)
        block, (stem, kind) = f"blocks.{layer}", rest.rsplit(".", 1)
        if ".lora." in rest:
            letter, place = rest.split("_lora.")[0][-1], rest.split(".lora.")[1]
            number = {"0.weight": "1", "2.weight": "2", "2.bias": "0"}[place]
            state[f"{block}.att.{letter}{number}"] = value.reshape(1, 1, -1) if number == "0" else value.T.contiguous()
        elif stem in simple:
            state[f"{block}.{simple[stem]}.{kind}"] = value
        elif rest == "attn.r_k":
            state[f"{block}.att.r_k"] = value
        else:  # the shares of the token before, and those of the keys
            state[f"{block}.{rest.replace('attn', 'att')}"] = value.reshape(1, 1, -1)
    for number in "012":  # their first layer has them, unused
        state[f"blocks.0.att.v{number}"] = state[f"blocks.0.att.a{number}"]
    return {name: value.clone() for name, value in state.items()}
