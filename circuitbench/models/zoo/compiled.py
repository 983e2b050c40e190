"""A Mamba-2 whose weights are set by code to solve associative recall with one head, so that its circuit is known.

At one layer, one head does everything (`k` a key token, `v` a value token, silu omitted):

    in_proj.x -> conv, tap of the current token  -> x_t = e(v_t)           what is stored
    in_proj.B -> conv, tap of the token before   -> B_t = e(k_{t-1})       under which key
    h_t = h_{t-1} + x_t B_t^T                                              the memory: state[value, key]
    in_proj.C -> conv, tap of the current token  -> C_t = e(k_t)           which key is asked for
    y_t = h_t C_t -> gate, norm, out_proj        -> residual 'answer'      read by lm_head alone

The true effect of everything else is known as well: the other heads of that layer compute but `out_proj` reads none
of them (effect exactly 0; one of them is a copy of the true head, so that what can be *decoded* from it is the same
and what it *causes* is nothing), and every other layer writes noise into residual dimensions nobody reads. Those
still enter the scale of the norms after them, so their effect on the logits is small rather than 0, and no answer
ever changes.

Two settings keep this exact. Every head is its own group (`n_groups = num_heads`), so each has its own B and C and
its own norm after the gate. And `layer_norm_epsilon` is 1, far above the variances here, so that the norms are nearly
linear: an effect is close to the sum of the effects of its parts, and gradients do not vanish as they do behind a
saturated norm.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, cast

import torch
from transformers import Mamba2Config, Mamba2ForCausalLM
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

from circuitbench.errors import BadInput

KERNEL = 4
_CURRENT, _PREVIOUS = KERNEL - 1, KERNEL - 2  # taps of the causal convolution, oldest token first


@dataclasses.dataclass(frozen=True)
class Truth:
    """Where the circuit is. Ranges are `(start, stop)`.

    Attributes:
        layer: The layer whose state is the memory.
        head: The head of that layer that carries the answer. Its state is `state[value, key]`.
        copy: A head of that layer that computes the same and is read by nobody; None if the layer has only one head.
        x_channels: Channels of `ssm.conv` (and of the x part of `in_proj`) that carry what is stored.
        B_channels: Channels of `ssm.conv` that carry the key it is stored under.
        C_channels: Channels of `ssm.conv` that carry the key that is asked for.
        x_tap: The only convolution tap in use on `x_channels`; `KERNEL - 1` is the current token, one less the token
            before.
        B_tap: The same for `B_channels`: the token before, so that a value is stored under the key in front of it.
        C_tap: The same for `C_channels`.
        token_dims: Residual dimensions that hold the token, one each.
        answer_dims: Residual dimensions that hold the answer, one a value; what `lm_head` reads.
        noise_dims: Residual dimensions that the other layers write and nobody reads.
    """

    layer: int
    head: int
    copy: int | None
    x_channels: tuple[int, int]
    B_channels: tuple[int, int]
    C_channels: tuple[int, int]
    x_tap: int
    B_tap: int
    C_tap: int
    token_dims: tuple[int, int]
    answer_dims: tuple[int, int]
    noise_dims: tuple[int, int]


def mqar(
    keys: int = 16,
    values: int = 16,
    heads: int = 8,
    layers: int = 2,
    layer: int = 1,
    head: int = 3,
    noise: float = 1.0,
    seed: int = 0,
) -> tuple[Mamba2ForCausalLM, Truth]:
    """Builds the model for `tasks.mqar(keys=keys, values=values)` and says where its circuit is.

    `d_model` is `heads * values / 2` and must hold the tokens (keys + values + 1), the answers (values) and the noise
    (at least 1).

    Args:
        keys: Number of keys; also the size of the state's second axis.
        values: Number of values; also the size of a head.
        heads: Number of heads of each layer.
        layers: Number of layers.
        layer: The layer that solves the task.
        head: Its head that does.
        noise: Scale of the random weights of everything else; 0 leaves them out.
        seed: Of the random weights.

    Returns:
        The model, float32 on the CPU in eval mode, every weight a float16 number so that saving in float16 changes
        nothing; and the record of its circuit.

    Raises:
        BadInput: A layer or head that does not exist, or sizes that do not fit `d_model`.
    """
    d_inner = heads * values
    d_model = d_inner // 2
    tokens = 1 + keys + values
    if not (0 <= layer < layers and 0 <= head < heads):
        raise BadInput(f"mqar was given layer {layer} of {layers} and head {head} of {heads}: both count from 0.")
    if d_inner % 2 or d_model < tokens + values + 1:
        raise BadInput(
            f"mqar with {keys} keys, {values} values and {heads} heads has d_model {d_inner / 2:g}, but needs a whole "
            f"number of at least {tokens + values + 1}: give heads >= {math.ceil(2 * (tokens + values + 1) / values)} "
            "with heads * values even."
        )
    config = Mamba2Config(
        vocab_size=tokens,
        hidden_size=d_model,
        num_hidden_layers=layers,
        num_heads=heads,
        head_dim=values,
        state_size=keys,
        n_groups=heads,
        conv_kernel=KERNEL,
        chunk_size=32,
        layer_norm_epsilon=1.0,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
    )
    x = head * values
    B = d_inner + head * keys
    C = d_inner + (heads + head) * keys
    truth = Truth(
        layer=layer,
        head=head,
        copy=(head + 1) % heads if heads > 1 else None,
        x_channels=(x, x + values),
        B_channels=(B, B + keys),
        C_channels=(C, C + keys),
        x_tap=_CURRENT,
        B_tap=_PREVIOUS,
        C_tap=_CURRENT,
        token_dims=(0, tokens),
        answer_dims=(tokens, tokens + values),
        noise_dims=(tokens + values, d_model),
    )
    model = Mamba2ForCausalLM(config)
    with torch.no_grad():
        _set_weights(model, truth, noise, torch.Generator().manual_seed(seed))
    return model.half().float().eval(), truth


def _set_weights(model: Mamba2ForCausalLM, truth: Truth, noise: float, generator: torch.Generator) -> None:
    config = model.config
    tokens, answer = slice(*truth.token_dims), slice(*truth.answer_dims)
    model.backbone.embeddings.weight.zero_()[:, tokens] = torch.eye(config.vocab_size)
    model.lm_head.weight.zero_()[1 + config.state_size :, answer] = 10 * torch.eye(
        config.head_dim
    )  # a right answer's logit: about 10
    mixers: list[Mamba2Mixer] = [cast(Any, block).mixer for block in model.backbone.layers]
    for i, mixer in enumerate(mixers):
        _fill_with_noise(mixer, noise, generator)
        if i != truth.layer:
            written = mixer.out_proj.weight[slice(*truth.noise_dims)]
            written.copy_(
                _random(written.shape, noise / 2 / math.sqrt(written.shape[1]), generator)
            )  # shorter than an embedding
            continue
        for h in (truth.head, truth.copy):
            if h is not None:
                _set_head(mixer, h, truth)
        own = slice(*truth.x_channels)
        mixer.out_proj.weight[answer, own] = 4 * torch.eye(config.head_dim)  # an answer about as large as an embedding


def _fill_with_noise(mixer: Mamba2Mixer, noise: float, generator: torch.Generator) -> None:
    """Makes every head compute something random from the tokens that leaves through no projection."""
    for parameter in mixer.parameters():
        parameter.zero_()
    mixer.in_proj.weight.copy_(_random(mixer.in_proj.weight.shape, noise, generator))
    mixer.in_proj.weight[-mixer.num_heads :] = 0  # dt is the same for every token
    mixer.conv1d.weight.copy_(_random(mixer.conv1d.weight.shape, noise / 2, generator))
    mixer.norm.weight.fill_(1)
    mixer.A_log.copy_(torch.linspace(-3, 0, mixer.num_heads))  # with dt = 1: memories of 1 to 20 tokens
    mixer.dt_bias.fill_(math.log(math.e - 1))  # softplus of it is 1


def _set_head(mixer: Mamba2Mixer, head: int, truth: Truth) -> None:
    """Turns one head into the memory."""
    keys, values = mixer.ssm_state_size, mixer.head_dim
    key_tokens, value_tokens = slice(1, 1 + keys), slice(1 + keys, 1 + keys + values)
    d_inner, groups = mixer.intermediate_size, mixer.n_groups
    parts = {  # where in the convolution's channels, which tokens it passes, at which tap
        "x": (head * values, value_tokens, truth.x_tap),
        "B": (d_inner + head * keys, key_tokens, truth.B_tap),
        "C": (d_inner + (groups + head) * keys, key_tokens, truth.C_tap),
    }
    for start, passed, tap in parts.values():
        size = passed.stop - passed.start
        projected = mixer.in_proj.weight[d_inner + start : d_inner + start + size]  # in_proj puts the gate before them
        projected.zero_()[:, passed] = torch.eye(size)
        mixer.conv1d.weight[start : start + size] = 0
        mixer.conv1d.weight[start : start + size, 0, tap] = 1
    gate = mixer.in_proj.weight[head * values : (head + 1) * values]
    gate.zero_()[:, slice(*truth.token_dims)] = 1  # exactly one token is on: a constant gate
    mixer.A_log[head] = -20  # decay exp(-exp(-20)): 1 in float32, nothing is forgotten


def _random(shape: torch.Size, scale: float, generator: torch.Generator) -> torch.Tensor:
    return scale * torch.randn(shape, generator=generator)
