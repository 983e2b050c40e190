"""What the attention branch and the SSM branch of a hybrid's layers each carry, and what they carry together.

A parallel hybrid (Falcon-H1, Hymba) runs both in one layer, and adds `ssm.out` and `attn.out` to the residual stream.
Three dictionaries are trained for such a layer, on the same tokens: one for each branch, and a joint one that reads
both and reconstructs both (a crosscoder). How a joint feature's direction is spread over the two blocks says whether it
belongs to one branch or is what both have in common.

Of the sum of the branches, T = S + A, the part that a reconstruction of one of them explains is
1 − Var(T − Ŝ) / Var(T), variances over tokens summed over components. It is below 0 where the branches work against
each other, so that T varies less than A alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from circuitbench.activations import ActivationStream, RowBatches, Rows, name_of, source_of
from circuitbench.activations.rows import joined
from circuitbench.dictionaries.base import Dictionary
from circuitbench.dictionaries.building import kind_of
from circuitbench.dictionaries.evaluation import reconstruction
from circuitbench.dictionaries.training import train_many
from circuitbench.errors import BadInput
from circuitbench.tracing.addresses import resolve

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

    from circuitbench.activations.text import Text
    from circuitbench.models import Model

SSM, ATTENTION, JOINT = "ssm", "attention", "joint"


@dataclass(frozen=True)
class BranchPair:
    """The two branches of a layer, or another two sites, and their dictionaries.

    Attributes:
        ssm: Address of the SSM's site.
        attention: Address of the attention's.
        dictionaries: "ssm", "attention" and "joint".
        fvu: Fraction of variance unexplained: "ssm" and "attention" of each on its own branch; "joint ssm" and "joint
            attention" of the joint one on each.
        l0: Active features a token, of each dictionary.
        dead_share: Share of features that are active on no token, of each dictionary.
        variance: "ssm" and "attention": the branch's variance as a share of the sum's; "shared": twice their
            covariance, likewise. The three add up to 1. Empty where the two sites differ in size, and so is
        explained: what is explained of the sum's variance by the reconstruction of "ssm", of "attention", of both
            by their own dictionaries ("both") and by the joint one ("joint").
        ssm_share: Of each joint feature: the SSM's part of its decoder direction, 1 where it writes to the SSM alone;
            in units of each branch's own activations (see `Dictionary.block_norms`).
        alive: Which joint features are active on some token.
        one_sided: From which part on a feature counts as one branch's own.
    """

    ssm: str
    attention: str
    dictionaries: Mapping[str, Dictionary]
    fvu: Mapping[str, float]
    l0: Mapping[str, float]
    dead_share: Mapping[str, float]
    variance: Mapping[str, float]
    explained: Mapping[str, float]
    ssm_share: Float[Tensor, " d_dict"]
    alive: Bool[Tensor, " d_dict"]
    one_sided: float

    @property
    def features(self) -> dict[str, float]:
        """Shares of the live joint features: the SSM's own, the attention's own, and what is shared."""
        share = self.ssm_share[self.alive]
        own = {SSM: share >= self.one_sided, ATTENTION: share <= 1 - self.one_sided}
        counts = {name: mask.double().mean().item() if len(share) else 0.0 for name, mask in own.items()}
        return counts | {"shared": 1.0 - sum(counts.values()) if len(share) else 0.0}

    def to_dict(self) -> dict[str, Any]:
        """All numbers, as JSON knows them."""
        names = ("ssm", "attention", "fvu", "l0", "dead_share", "variance", "explained", "features", "one_sided")
        found = {name: getattr(self, name) for name in names}
        return {name: dict(value) if isinstance(value, Mapping) else value for name, value in found.items()}


@dataclass(frozen=True)
class Branches:
    """What `separate_branches` found, one entry for each pair of branches.

    Attributes:
        pairs: In the order of the layers.
        n_rows: Tokens on which all numbers were measured.
        held_out: Whether the dictionaries had not been trained on them.
    """

    pairs: Sequence[BranchPair]
    n_rows: int
    held_out: bool

    def to_dict(self) -> dict[str, Any]:
        """All numbers, as JSON knows them."""
        return {"n_rows": self.n_rows, "held_out": self.held_out, "pairs": [pair.to_dict() for pair in self.pairs]}

    def __str__(self) -> str:
        heads = "".join(f" {name:>6}" for name in ("var", "FVU", "joint", "expl", "L0", "dead"))
        lines = [f"{self.n_rows} tokens of {'held-out text' if self.held_out else 'the text of training'}"]
        for pair in self.pairs:
            lines.append(f"{pair.ssm} + {pair.attention}")
            lines.append(f"  {'':10}{heads}  features")
            for name in (SSM, ATTENTION):
                on_own = (pair.fvu[name], pair.fvu[f"joint {name}"])
                numbers = [pair.variance.get(name), *on_own, pair.explained.get(name)]
                lines.append(_line(name, numbers, pair, f"{pair.features[name]:8.1%}"))
            both = [pair.variance.get("shared"), None, None, pair.explained.get("both")]
            lines.append(_line("both", both, pair, f"{pair.features['shared']:8.1%}"))
            lines.append(_line(JOINT, [None, None, None, pair.explained.get(JOINT)], pair, ""))
        return "\n".join(lines)


def separate_branches(
    model: Model,
    text: Text | ActivationStream,
    *,
    layers: Sequence[int] | None = None,
    pairs: Sequence[tuple[str, str]] | None = None,
    kind: str = "topk",
    k: int | None = None,
    expansion: int | None = None,
    d_dict: int | None = None,
    steps: int = 1000,
    batch_size: int = 1024,
    held_out: Text | None = None,
    one_sided: float = 0.9,
    context: int | None = None,
    prompts_per_forward: int | None = None,
    memory_gib: float = 2.0,
    seed: int = 0,
    progress: bool = True,
    **settings: Any,
) -> Branches:
    """Train dictionaries of the attention and the SSM branch of each layer, and a joint one, reading a text once.

    The joint dictionary has as many features as the two others together, and twice their k.

    Args:
        model: A hybrid.
        text: As for `train_sae`.
        layers: Which layers; ``None``: all that have both branches.
        pairs: Instead of layers: (address of the SSM's site, address of the attention's), such as
            ``("layers.0.ssm.branch", "layers.0.attn.branch")``; or of different layers, where a hybrid has its SSM
            and its attention in turn.
        kind: Of all three dictionaries.
        k: Features active on a token, of kinds that fix it; 32 where it is not given.
        expansion: Features of a branch's dictionary a component; 8 where neither it nor `d_dict` is given.
        d_dict: Or the number of features of a branch's dictionary.
        steps: Optimizer steps.
        batch_size: Rows a step.
        held_out: Text to measure on; ``None``: on what was trained on.
        one_sided: A joint feature is one branch's own if at least this part of its direction lies there.
        context: As for `train_sae`, and so is
        prompts_per_forward: this.
        memory_gib: GiB of activations that may be held.
        seed: Of the order of rows and the dictionaries.
        progress: Show progress bars.
        **settings: Of `dictionaries.train`, for all of them: lr, auxk_weight, …

    Raises:
        SiteNotFound: For an address that is not there.
        BadInput: For layers without both branches, a text without tokens, or settings out of range.
    """
    if not 0.5 < one_sided <= 1:
        raise BadInput(f"one_sided={one_sided} was given; it is a part of a feature's direction, above 0.5 up to 1.")
    if expansion is not None and d_dict is not None:
        raise BadInput(f"d_dict={d_dict} and expansion={expansion} were given; give one of them, such as expansion=8.")
    places = _pairs(model, layers, pairs)
    sites = resolve(model, [site for pair in places for site in pair])
    reading = {"context": context, "sequences_per_forward": prompts_per_forward, "progress": progress or None}
    batches = RowBatches(
        source_of(model, sites, text, **reading), batch_size=batch_size, seed=seed, memory_gib=memory_gib
    )
    has_k = "k" in kind_of(kind).settings_names
    k = 32 if k is None and has_k else k
    size = {"expansion": 8 if expansion is None else expansion} if d_dict is None else {"d_dict": d_dict}
    recipes: list[dict[str, Any]] = []
    for ssm, attention in places:
        one = {"kind": kind, **size, **({} if k is None else {"k": k}), **settings}
        more = ({} if d_dict is None else {"d_dict": 2 * d_dict}) | ({} if k is None else {"k": 2 * k})
        recipes += [
            one | {"site": ssm, "name": ssm},
            one | {"site": attention, "name": attention},
            one | more | {"sites": (ssm, attention), "name": f"{ssm}+{attention}"},
        ]
    results = train_many(batches, recipes, steps=steps, batch_size=batch_size, seed=seed, progress=progress)
    rows = batches.sample() if held_out is None else _read(ActivationStream(model, sites, held_out, **_given(reading)))
    found = []
    for i, (ssm, attention) in enumerate(places):
        trained = [result.dictionary for result in results[3 * i : 3 * i + 3]]
        for dictionary in trained:
            dictionary.model_name = name_of(model)
        trained[0].site, trained[1].site = ssm, attention
        dictionaries: dict[str, Dictionary] = dict(zip((SSM, ATTENTION, JOINT), trained, strict=True))
        found.append(measured(dictionaries, rows[ssm].float(), rows[attention].float(), ssm, attention, one_sided))
    return Branches(found, rows.n, held_out is not None)


@torch.no_grad()
def measured(
    dictionaries: Mapping[str, Dictionary],
    ssm: Float[Tensor, "n d_ssm"],
    attention: Float[Tensor, "n d_attention"],
    ssm_site: str,
    attention_site: str,
    one_sided: float,
) -> BranchPair:
    """What the dictionaries "ssm", "attention" and "joint" explain of these rows of both branches."""
    both = torch.cat([ssm, attention], 1)
    of = {SSM: ssm, ATTENTION: attention, JOINT: both}
    judged = {name: reconstruction(dictionary, of[name]) for name, dictionary in dictionaries.items()}
    back = {name: torch.cat([dictionaries[name](part) for part in rows.split(4096)]) for name, rows in of.items()}
    blocks = back[JOINT].split([ssm.shape[1], attention.shape[1]], dim=1)
    fvu = {name: judged[name].fvu for name in (SSM, ATTENTION)}
    for name, block in zip((SSM, ATTENTION), blocks, strict=True):
        fvu[f"joint {name}"] = (_variance(of[name], block) / _variance(of[name])).item()
    variance: dict[str, float] = {}
    explained: dict[str, float] = {}
    if ssm.shape == attention.shape:
        total = ssm + attention
        whole = _variance(total)
        variance = {name: (_variance(of[name]) / whole).item() for name in (SSM, ATTENTION)}
        variance["shared"] = 1.0 - variance[SSM] - variance[ATTENTION]
        by = {SSM: back[SSM], ATTENTION: back[ATTENTION], "both": back[SSM] + back[ATTENTION]}
        by[JOINT] = blocks[0] + blocks[1]
        explained = {name: (1 - _variance(total - part) / whole).item() for name, part in by.items()}
    return BranchPair(
        ssm=ssm_site,
        attention=attention_site,
        dictionaries=dictionaries,
        fvu=fvu,
        l0={name: found.l0 for name, found in judged.items()},
        dead_share={name: found.dead_share for name, found in judged.items()},
        variance=variance,
        explained=explained,
        ssm_share=dictionaries[JOINT].block_norms()[0],
        alive=judged[JOINT].density > 0,
        one_sided=one_sided,
    )


def _variance(rows: Tensor, around: Tensor | None = None) -> Tensor:
    """Summed squares around the mean, or around given rows."""
    rows = rows.double()
    return (rows - (rows.mean(0) if around is None else around.double())).pow(2).sum()


def _pairs(
    model: Model, layers: Sequence[int] | None, pairs: Sequence[tuple[str, str]] | None
) -> list[tuple[str, str]]:
    """The (SSM, attention) addresses that are meant."""
    if pairs is not None:
        if layers is not None or not pairs or any(isinstance(pair, str) or len(pair) != 2 for pair in pairs):
            raise BadInput(
                f"pairs={pairs!r}, layers={layers!r} were given; pairs are a list of (SSM's site, attention's site), "
                "instead of layers."
            )
        found = [(resolve(model, ssm), resolve(model, attention)) for ssm, attention in pairs]
        if any(len(ssm) != 1 or len(attention) != 1 or ssm == attention for ssm, attention in found):
            raise BadInput(f"pairs={pairs!r} was given; each names two different sites, one address each.")
        return [(ssm[0], attention[0]) for ssm, attention in found]
    ssm, attn = (
        [i for i, layer in enumerate(model.layers) if f"{name}.out" in layer.sites] for name in ("ssm", "attn")
    )
    both = [i for i in ssm if i in attn]
    if not both:
        raise BadInput(
            f"No layer here has both branches: layers {ssm or 'none'} have an SSM, {attn or 'none'} attention. "
            'Say which belong together, such as pairs=[("layers.0.ssm.out", "layers.1.attn.out")].'
        )
    count = len(model.layers)
    chosen = both if layers is None else [layer % count if -count <= layer < count else layer for layer in layers]
    if not chosen or not set(chosen) <= set(both):
        raise BadInput(f"layers={list(layers or [])} was given; layers {both} have both branches, attention and SSM.")
    return [(f"layers.{i}.ssm.out", f"layers.{i}.attn.out") for i in chosen]


def _given(reading: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in reading.items() if value is not None}


def _read(stream: ActivationStream) -> Rows:
    return joined(list(stream))


def _line(name: str, numbers: Sequence[float | None], pair: BranchPair, features: str) -> str:
    cells = " ".join(f"{'':6}" if number is None else f"{number:6.3f}" for number in numbers)
    beside = f"{pair.l0[name]:6.1f} {pair.dead_share[name]:6.1%}" if name in pair.l0 else f"{'':6} {'':6}"
    return f"  {name:10} {cells} {beside} {features}".rstrip()
