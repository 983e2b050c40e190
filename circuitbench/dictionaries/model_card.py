"""The model card of a dictionary: what it reads, how good it is, how to load it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from circuitbench.dictionaries.base import Dictionary
from circuitbench.dictionaries.formats.saelens import OURS, architecture

_MEANING = {
    "fvu": "fraction of variance unexplained",
    "explained_variance": "1 − FVU",
    "cosine": "of a token's activation with its reconstruction, the mean",
    "l2_in": "length of an activation, the mean",
    "l2_out": "length of a reconstruction, the mean",
    "mse": "squared error of a component, the mean",
    "l0": "features active on a token, the mean",
    "l1": "sum of activations on a token, the mean",
    "dead_share": "share of features that are active on no token",
    "ce_clean": "loss of the model, nats a token",
    "ce_spliced": "loss with the site replaced by its reconstruction",
    "ce_ablated.zero": "loss with the site replaced by 0",
    "ce_ablated.mean": "loss with the site replaced by its mean",
    "ce_recovered.zero": "(ablated − spliced) / (ablated − clean)",
    "ce_recovered.mean": "(ablated − spliced) / (ablated − clean)",
    "kl": "KL(clean ‖ spliced) of next tokens, nats",
    "n_tokens": "predicted tokens the losses are means of",
    "n_rows": "tokens it was measured on",
}
_HEADER = """\
---
library_name: circuitbench
{base_model}tags:
- sparse-autoencoder
- mechanistic-interpretability
- circuitbench
---

# {name}

A sparse dictionary of {model}. It reads {site}.
"""
_LOADING = """\

## Loading

```python
import circuitbench as cb

dictionary = cb.load_dictionary("{name}")
features = dictionary.encode(activations)       # (…, {d_in}) to (…, {d_dict})
```
"""
_SAELENS = """\

SAELens loads it as `{architecture}`:

```python
from huggingface_hub import snapshot_download
from sae_lens import SAE

sae = SAE.load_from_disk(snapshot_download("{repo_id}"){below})
```
"""


def measures(evaluation: Any) -> dict[str, Any]:
    """The numbers of an evaluation by name; nested ones are joined, as in `ce_ablated.zero`.

    Args:
        evaluation: what `evaluate` returns, or a mapping. Tensors of more than one number are left out, and what is not
            defined (NaN).
    """
    if dataclasses.is_dataclass(evaluation):
        names = [field.name for field in dataclasses.fields(evaluation)]
        names += [name for name in dir(type(evaluation)) if isinstance(getattr(type(evaluation), name), property)]
        evaluation = {name: getattr(evaluation, name) for name in names}
    flat: dict[str, Any] = {}
    for name, value in evaluation.items():
        if dataclasses.is_dataclass(value):
            flat |= measures(value)
        elif isinstance(value, Mapping):
            flat |= {f"{name}.{key}": inner for key, inner in measures(value).items()}
        elif isinstance(value, Tensor) and value.numel() == 1:
            flat[name] = value.item()
        elif isinstance(value, int | str) or (isinstance(value, float) and math.isfinite(value)):
            flat[name] = value
    if {"ce_clean", "ce_spliced"} <= flat.keys():
        for name in [name for name in flat if name.startswith("ce_ablated.")]:
            lost = flat[name] - flat["ce_clean"]
            if lost > 0:  # a share of nothing is not defined
                flat[name.replace("ablated", "recovered")] = (flat[name] - flat["ce_spliced"]) / lost
    return flat


def card(dictionary: Dictionary, repo_id: str, *, subfolder: str | None = None) -> str:
    """The text of `README.md`, in Markdown with the Hub's header.

    Args:
        dictionary: with its `metadata`, of which "evaluation" becomes the table of measures.
        repo_id: where it will lie.
        subfolder: and in which folder there.
    """
    name = "/".join(filter(None, [repo_id, subfolder]))
    model = dictionary.model_name
    text = _HEADER.format(
        base_model=f"base_model: {model}\n" if model and "/" in model else "",
        name=name,
        model=f"`{model}`" if model else "a model that is not recorded",
        site=_sites(dictionary),
    )
    text += "\n" + _table(("what", ""), [(key, _shown(value)) for key, value in _facts(dictionary).items()])
    evaluation = measures(dictionary.metadata.get("evaluation", {}))
    if evaluation:
        rows = [(key, _shown(value), _MEANING.get(key, "")) for key, value in evaluation.items()]
        text += "\n## Measured on held-out text\n\n" + _table(("measure", "value", "what it is"), rows)
    told = measures({key: value for key, value in dictionary.metadata.items() if key not in ("evaluation", "saelens")})
    if told:
        text += "\n## Training\n\n" + _table(("what", ""), [(key, _shown(value)) for key, value in told.items()])
    text += _LOADING.format(name=name, d_in=dictionary.d_in, d_dict=dictionary.d_dict)
    theirs = architecture(dictionary.kind, dictionary.transcodes, dictionary.W_skip is not None)
    if theirs.startswith(OURS):
        return text + "\nSAELens has no architecture that does the same as this kind.\n"
    below = f' + "/{subfolder}"' if subfolder else ""
    return text + _SAELENS.format(architecture=theirs, repo_id=repo_id, below=below)


def _sites(dictionary: Dictionary) -> str:
    if dictionary.blocks:
        return ", ".join(f"`{address}`" for address in dictionary.blocks) + ", one after the other in one row"
    reads = f"`{dictionary.site}`" if dictionary.site else "a site that is not recorded"
    if not dictionary.transcodes:
        return reads
    return f"{reads} and reconstructs {f'`{dictionary.site_out}`' if dictionary.site_out else 'another'} from it"


def _facts(dictionary: Dictionary) -> dict[str, Any]:
    form = "transcoder" if dictionary.transcodes else "crosscoder" if dictionary.blocks else "autoencoder"
    skip = " with a skip" if dictionary.W_skip is not None else ""
    return {
        "kind": f"{dictionary.kind}, {form}{skip}",
        **dictionary.settings,
        "d_in": dictionary.d_in,
        "d_dict": dictionary.d_dict,
        **({"d_out": dictionary.d_out} if dictionary.transcodes else {}),
        **{f"width of {address}": width for address, width in dictionary.blocks.items()},
        "dtype": str(dictionary.b_dec.dtype).removeprefix("torch."),
    }


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "\\|").replace("\n", " ")
