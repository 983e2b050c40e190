"""What a feature's direction says about the next token: the linear path from its site to the logits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import BadInput
from ..models.prompts import encode
from ..tracing.addresses import resolve
from ..tracing.forward import forward
from ..tracing.interventions import Set

if TYPE_CHECKING:
    from jaxtyping import Float

    from ..models import Model

# Sites that are mapped, token by token and linearly, to what their branch adds to the stream; and the stream's own.
BEFORE_OUTPUT = {"ssm.gated": "ssm.out", "conv.gated": "conv.out", "attn.z": "attn.out", "mlp.hidden": "mlp.out"}
IN_STREAM = ("resid_pre", "resid_mid", "resid_post", "ssm.out", "conv.out", "attn.out", "mlp.out")
CONTEXT, PROMPTS = 32, 8


@torch.no_grad()
def logit_effects(model: Model, site: str, directions: Float[Tensor, "n d"]) -> Iterator[Float[Tensor, "some vocab"]]:
    """How adding each direction at a site moves the logits through the path without layers, some directions at a time.

    The path is what lies between the site and the stream (an output projection, multipliers) and then the final norm's
    gain and the unembedding, all taken from the model itself. Two things are left out: what the layers in between make
    of the direction, and the final norm's division by the size of the stream, a positive factor that changes from
    token to token. The mean over the vocabulary, which no probability depends on, is subtracted.

    Args:
        model: The model.
        site: Where the directions are added: a stream, what a branch adds to it, or the input of an output projection.
        directions: One a row.

    Raises:
        BadInput: For a site from which no fixed linear map leads to the logits, or directions of another size.
    """
    (address,) = resolve(model, site)
    stem, _, name = address.partition(".")[2].partition(".") if address.startswith("layers.") else ("", "", address)
    target = BEFORE_OUTPUT.get(name)
    if target is None and name not in IN_STREAM and address != "embed":
        raise BadInput(
            f"No fixed linear map leads from {address} to the logits; there is one from "
            f"{', '.join([*BEFORE_OUTPUT, *IN_STREAM])} and embed. Leave logit effects out with logit_tokens=0."
        )
    last = resolve(model, "layers.-1.resid_post")[0]
    for rows in directions.float().split(CONTEXT * PROMPTS):
        stream = rows
        if target is not None:
            out = f"layers.{stem}.{target}"
            stream = odd_part(model, address, rows, out)
            twice = odd_part(model, address, 2 * rows, out)
            if (twice - 2 * stream).norm() > 1e-3 * twice.norm():
                raise BadInput(
                    f"{out} is not linear in {address} in this model (a norm is in between), so a direction there has "
                    "no fixed effect on the logits. Leave logit effects out with logit_tokens=0."
                )
        # The norm divides by the length (over √d), which is put back.
        length = stream.norm(dim=1, keepdim=True) / stream.shape[1] ** 0.5
        unit = torch.where(length > 0, stream / length.clamp_min(torch.finfo(stream.dtype).tiny), 0)
        moved = odd_part(model, last, unit, "logits") * length
        yield moved - moved.mean(1, keepdim=True)


def odd_part(model: Model, site: str, rows: Float[Tensor, "n d"], out: str) -> Float[Tensor, "n d_out"]:
    """(g(x) − g(−x)) / 2 for each row, with g from one site to another at the same token: an affine map's linear part.

    Run as tokens of a few prompts, of whose own text nothing is left from the site on.
    """
    n = len(rows)
    padded = torch.zeros(PROMPTS * CONTEXT, rows.shape[1], dtype=rows.dtype)
    padded[:n] = rows.cpu()
    prompt = encode(model, torch.zeros(PROMPTS, CONTEXT, dtype=torch.long))
    sides = []
    for sign in (1, -1):
        change = Set(site, sign * padded.view(PROMPTS, CONTEXT, -1))
        sides.append(forward(model, prompt, change, [out])[out].float().cpu().flatten(0, 1)[:n])
    return (sides[0] - sides[1]) / 2


def strongest(effects: Float[Tensor, "some vocab"], n: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(ids, values) of the tokens that are promoted most, and of those that are suppressed most, `(some, n)` each."""
    n = min(n, effects.shape[1])
    up, down = effects.topk(n, dim=1), (-effects).topk(n, dim=1)
    return up.indices.int(), up.values, down.indices.int(), -down.values
