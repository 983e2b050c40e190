"""What the demo measures: prompts that need their context, what they depend on, and the feature that they hang on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor
from tqdm.auto import tqdm

from .activations import ActivationStream
from .circuits import EffectMap, ablation_effects, logit_diff, loss, patch_effects
from .circuits.metrics import token_id
from .dictionaries import Dictionary
from .errors import BadInput
from .explain import FeatureExamples
from .models import Model
from .models.prompts import Batch, encode
from .tracing import Add, capture, hold
from .tracing.forward import forward

OPENED = [
    "    return values{}start, end",
    "        line = lines{}start + 1",
    "    value = items{}key, name",
    "    return self.data{}i, j",
    "        self.names{}name, value",
    "    return self.data{}index + 1",
    "    keys = {}None, True, False",
    "    x = foo{}1, 2, 3",
    "    values = {}x + 1 for x in values",
    "    return {}name for name in names",
]
NAMED = [
    "def load({}):\n    return open(",
    "def load({}):\n    with open(",
    "def read({}, mode):\n    return open(",
    "    def __init__(self, {}):\n        self.",
]
NAMES = [("path", "filename"), ("file", "filename"), ("name", "text"), ("name", "value")]
ENGLISH = [
    ("The capital of {} is", ("France", "Italy"), (" Paris", " Rome")),
    ("When Mary and John went to the store, {} gave a drink to", ("John", "Mary"), (" Mary", " John")),
]


@dataclass(frozen=True)
class Contrast:
    """Two prompts that differ in one place, and the next token that each asks for."""

    clean: str
    corrupt: str
    answer: str
    wrong: str


@dataclass
class Measured:
    """A contrast as the model sees it.

    Attributes:
        answered: Probability of the answer after the clean prompt, and of the other one after the corrupt prompt.
        base: logit of the answer less logit of the other, after the clean prompt.
        donor: The same, after the corrupt prompt.
        states: Effects of putting the corrupt prompt's state into the clean run.
    """

    contrast: Contrast
    answered: tuple[float, float]
    base: float
    donor: float
    states: EffectMap | None = None

    @property
    def surety(self) -> float:
        """The smaller of the two probabilities."""
        return min(self.answered)

    @property
    def carried(self) -> float:
        """The share of the whole difference that one state, put in from the other prompt, makes."""
        assert self.states is not None
        return self.states.top(1)[0].value / (self.donor - self.base)


@dataclass
class Steering:
    """What suppressing one feature does to the contrasts that ask for the same two tokens.

    Attributes:
        feature: Which one.
        tried: Of how many.
        effect: Its removal at the last token: the change of the preference, the mean over `family`.
        largest: Its largest activation on held-out text.
        factor: Strength of the steering, in units of `largest`.
        turned: Contrasts whose preference turns when it is suppressed with that strength.
        cost: What that costs on other text, nats a token.
        texts: (what was done, prompt, plain continuation, steered continuation).
    """

    feature: int
    tried: int
    family: list[Measured]
    effect: float
    largest: float
    factor: int
    turned: list[Measured]
    cost: float
    texts: list[tuple[str, str, str, str]] = field(default_factory=list)


def candidates() -> Iterator[list[Contrast]]:
    """Pairs of prompts in which something that was said before decides what comes next, by the template they share."""
    for template in OPENED:
        yield [Contrast(template.format("["), template.format("("), "]", ")")]
    for template in NAMED:
        yield [Contrast(template.format(one), template.format(other), one, other) for one, other in NAMES]
    for template, (one, other), answers in ENGLISH:
        yield [Contrast(template.format(one), template.format(other), *answers)]


def measured_contrasts(model: Model, progress: bool) -> list[Measured]:
    """The contrasts that the model gets right, of each template the surest: the one to look at, then by `carried`."""
    found = []
    for group in tqdm(list(candidates()), disable=not progress, desc="prompts", unit="template"):
        right = [one for one in (answered(model, contrast) for contrast in group) if one and one.base > 0 > one.donor]
        if right:
            found.append(max(right, key=lambda one: one.surety))
    if not found:
        raise BadInput(
            "This model answers none of the demo's prompts as their context asks (or its tokenizer has their answers "
            "not as single tokens); take a model of code or English."
        )
    for one in tqdm(found, disable=not progress, desc="states", unit="prompt"):
        one.states = patched(model, one.contrast, "ssm.state", False)
    best = max(found, key=lambda one: one.carried * one.surety)
    return [best, *sorted((one for one in found if one is not best), key=lambda one: -one.carried)]


def answered(model: Model, contrast: Contrast) -> Measured | None:
    """What the model says to a contrast; nothing, if its tokenizer does not make tokens of it that can be compared."""
    assert model.tokenizer is not None  # `load_model` gives every model one
    ids = [model.tokenizer(text, add_special_tokens=False)["input_ids"] for text in (contrast.answer, contrast.wrong)]
    rows = [encode(model, prompt) for prompt in (contrast.clean, contrast.corrupt)]
    if any(len(index) != 1 for index in ids) or rows[0].input_ids.shape != rows[1].input_ids.shape:
        return None
    (answer,), (wrong,) = ids
    clean, corrupt = (forward(model, row)["logits"][0, -1].float().cpu() for row in rows)
    return Measured(
        contrast,
        (clean.softmax(-1)[answer].item(), corrupt.softmax(-1)[wrong].item()),
        (clean[answer] - clean[wrong]).item(),
        (corrupt[answer] - corrupt[wrong]).item(),
    )


def patched(model: Model, contrast: Contrast, site: str, progress: bool) -> EffectMap:
    """Effects of the corrupt prompt's values, put into the clean run."""
    metric = logit_diff(contrast.answer, contrast.wrong)
    return patch_effects(model, contrast.clean, contrast.corrupt, site, metric=metric, progress=progress)


def effect_maps(model: Model, measured: Measured, progress: bool) -> list[EffectMap]:
    """What one prompt depends on: its states, put in and set to zero, and its branches."""
    contrast = measured.contrast
    metric = logit_diff(contrast.answer, contrast.wrong)
    assert measured.states is not None
    zero = ablation_effects(model, contrast.clean, "ssm.state", metric=metric, progress=progress)
    return [measured.states, zero, *branch_maps(model, contrast, progress)]


def branch_maps(model: Model, contrast: Contrast, progress: bool) -> list[EffectMap]:
    """Effects of the outputs of every kind of branch; of the mixers in one map, where no layer has two."""
    sites = {site for layer in model.layers for site in layer.sites}
    maps = [patched(model, contrast, site, progress) for site in ("ssm.out", "attn.out") if site in sites]
    if len(maps) == 2 and not ((~maps[0].values.isnan()) & (~maps[1].values.isnan())).any():
        values = torch.where(maps[0].values.isnan(), maps[1].values, maps[0].values)
        maps = [EffectMap(values, maps[0].tokens, "ssm.out or attn.out", maps[0].metric, maps[0].base, maps[0].donor)]
    return maps + ([patched(model, contrast, "mlp.out", progress)] if "mlp.out" in sites else [])


@torch.no_grad()
def steered(
    model: Model,
    dictionary: Dictionary,
    contrasts: list[Measured],
    examples: FeatureExamples,
    text: list[str],
    progress: bool,
) -> Steering:
    """A feature on which a preference hangs, and what steering it makes of the text.

    Of the features that tell the prompts apart, the six whose removal changes the preference most are suppressed with
    several strengths; taken is what turns most prompts at the least cost on other text.
    """
    pair = contrasts[0].contrast.answer, contrasts[0].contrast.wrong
    family = [one for one in contrasts if (one.contrast.answer, one.contrast.wrong) == pair]
    site = dictionary.site
    assert site is not None
    codes = [
        [dictionary.encode(capture(model, prompt, site)[site][0, -1]) for prompt in (c.clean, c.corrupt)]
        for c in (one.contrast for one in family)
    ]
    tried = sorted({f for clean, corrupt in codes for f in (clean - corrupt).topk(8).indices.tolist()})
    effects = []
    for one, (clean, _) in zip(tqdm(family, disable=not progress, desc="features", unit="prompt"), codes, strict=True):
        removed = -(clean[tried, None] * dictionary.W_dec[tried])[:, None]
        change = Add(site, removed, positions="last")
        effects.append(preferences(model, [one.contrast.clean] * len(tried), one.contrast, change) - one.base)
    mean = torch.stack(effects).mean(0)
    neutral = windows_of(model, site, text, 64, 4)
    unsteered = loss(forward(model, neutral)["logits"].cpu(), neutral).mean().item()

    trials = []
    for best in mean.argsort()[:6].tolist():
        feature, largest = tried[best], examples.values[tried[best]].max().item()
        for factor in (1, 2, 3, 4, 6) if largest > 0 else ():
            change = Add(site, dictionary.W_dec[feature], -factor * largest)
            values = preferences(model, [one.contrast.clean for one in family], contrasts[0].contrast, change)
            turned = [one for one, value in zip(family, values.tolist(), strict=True) if value < 0]
            cost = loss(forward(model, neutral, change)["logits"].cpu(), neutral).mean().item() - unsteered
            trials.append(Steering(feature, len(tried), family, mean[best].item(), largest, factor, turned, cost))
    if not trials:
        raise BadInput("No feature that tells the prompts apart is active on the held-out text; give more text.")
    enough = [trial for trial in trials if 2 * len(trial.turned) > len(family)]
    found = min(enough, key=lambda trial: trial.cost) if enough else max(trials, key=lambda trial: len(trial.turned))
    direction = dictionary.W_dec[found.feature]
    for one in (found.turned or family)[:2]:
        suppressed = Add(site, direction, -found.factor * found.largest)
        what = f"suppressed by {found.factor} × its largest activation at every token, generated ones included"
        found.texts.append((what, one.contrast.clean, *continued(model, one.contrast.clean, suppressed)))
    corrupt = contrasts[0].contrast.corrupt
    for factor in (1, 2, 3, 4, 6, 8):
        # At the prompt's tokens only: a bracket that is always open leaves nothing to write but its end.
        prompt = slice(0, encode(model, corrupt).input_ids.shape[1])
        added = Add(site, direction, factor * found.largest, prompt)
        if preferences(model, [corrupt], contrasts[0].contrast, added) > 0:
            what = f"added with {factor} × its largest activation at the prompt's tokens"
            found.texts.append((what, corrupt, *continued(model, corrupt, added)))
            break
    return found


def windows_of(model: Model, site: str, text: list[str], context: int, n: int) -> Batch:
    """Some windows of a text, spread over it."""
    sequences = [ids for _, ids in ActivationStream(model, site, text, context=context).sequences()]
    whole = [ids for ids in sequences if len(ids) == context]
    if not whole:
        raise BadInput(f"The held-out text is shorter than {context} tokens; give more text.")
    return encode(model, [whole[int(i)] for i in torch.linspace(0, len(whole) - 1, n)])


def preferences(model: Model, prompts: list[str], contrast: Contrast, change: Add) -> Tensor:
    """Logit of the contrast's answer less that of the other, after each prompt, with an intervention."""
    logits = forward(model, encode(model, prompts), change)["logits"][:, -1].float().cpu()
    return logits[:, token_id(model, contrast.answer)] - logits[:, token_id(model, contrast.wrong)]


def continued(model: Model, prompt: str, change: Add) -> tuple[str, str]:
    """A prompt continued as it is, and with an intervention held."""
    plain = model.generate_text(prompt, max_new_tokens=24)
    with hold(model, change):
        return plain, model.generate_text(prompt, max_new_tokens=24)


def telling(examples: FeatureExamples, n: int) -> list[int]:
    """Features that are rare, and strong in several places of the text, not at the beginning of a window."""
    rare = (examples.density > 2e-4) & (examples.density < 0.03) & (examples.positions.median(1).values > 3)
    strength = examples.values.min(1).values * rare
    return strength.topk(min(4 * n, len(strength))).indices[::4].tolist()


@torch.no_grad()
def promotions(
    model: Model, dictionary: Dictionary, features: list[int], examples: FeatureExamples, text: list[str]
) -> dict[int, Tensor]:
    """How adding each feature changes the logits of the next token, less the mean change of all tokens: measured.

    Added at the last of 16 tokens with the feature's largest activation; the mean over 8 places of the text.
    """
    assert dictionary.site is not None
    batch = windows_of(model, dictionary.site, text, 16, 8)
    base = forward(model, batch)["logits"][:, -1]
    out = {}
    for f in features:
        change = Add(dictionary.site, dictionary.W_dec[f], examples.values[f].max().item(), positions="last")
        moved = (forward(model, batch, change)["logits"][:, -1] - base).mean(0)
        out[f] = (moved - moved.mean()).cpu()
    return out
