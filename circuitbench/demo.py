"""The whole way on real text: check, measure what a prompt depends on, decompose a site, steer, and write it all down.

Everything it shows is chosen by measuring, from candidates listed in `demo_measures`; nothing is known beforehand about
the model it runs on.
"""

from __future__ import annotations

import platform
import random
import time
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from .activations import ActivationStream
from .circuits import EffectMap
from .demo_measures import (
    Measured,
    Steering,
    branch_maps,
    effect_maps,
    measured_contrasts,
    promotions,
    steered,
    telling,
)
from .demo_report import write
from .dictionaries import Evaluation, TrainResult, evaluate, train_on_text
from .errors import BadInput
from .explain import FeatureExamples, feature_examples
from .models import Model, load_model
from .models.zoo import corpus
from .tracing import check
from .tracing.checks.report import CheckReport


@dataclass(frozen=True)
class Size:
    """How much of everything: characters of text, optimizer steps, features shown."""

    train: int
    held_out: int
    judged: int
    steps: int
    expansion: int
    cards: int


FULL = Size(train=800_000, held_out=150_000, judged=40_000, steps=800, expansion=8, cards=8)
FAST = Size(train=200_000, held_out=60_000, judged=12_000, steps=200, expansion=4, cards=5)


@dataclass
class Findings:
    """Everything the report tells."""

    source: str
    model: Model
    size: Size
    text: str
    site: str
    checked: CheckReport
    contrasts: list[Measured]
    maps: list[EffectMap]
    other_maps: list[EffectMap]
    training: TrainResult
    n_tokens: int
    evaluation: Evaluation
    examples: FeatureExamples
    cards: list[int]
    promoted: dict[int, Tensor]
    steering: Steering
    seconds: float

    @property
    def main(self) -> Measured:
        """The contrast that is looked at: the model is sure, and a state matters."""
        return self.contrasts[0]

    @property
    def other(self) -> Measured:
        """The one in which they matter least."""
        return self.contrasts[-1]


def run_demo(*, fast: bool, model: str, text: str | None, out: Path, progress: bool) -> Path:
    """Run the demo, and write ``report.html``, ``findings.json`` and the dictionary into a folder.

    Args:
        fast: Less text and fewer steps.
        model: What `load_model` takes; it needs a recurrent layer and a tokenizer.
        text: A text file to work on; default: the standard library's sources, of which the shipped models have not
            seen the part that is held out.
        out: Folder, made if need be.
        progress: Show bars.

    Returns:
        Where the report is.

    Raises:
        BadInput: For a model without recurrent layers or whose tokenizer reads none of the prompts, or a text that
            cannot be read or is too short.
        CheckFailed: If the model's map does not hold: what follows would not mean what it says.
    """
    started = time.perf_counter()
    size = FAST if fast else FULL
    training_text, held_out, described = texts(text, size)
    loaded = load_model(model)
    check_reads_text(loaded, model)
    site = f"layers.{last_scan(loaded, model)}.ssm.gated"
    checked = check(loaded, progress=progress).raise_if_failed()

    contrasts = measured_contrasts(loaded, progress)
    maps = effect_maps(loaded, contrasts[0], progress)
    last = contrasts[-1]
    assert last.states is not None  # `measured_contrasts` measures them
    other_maps = [last.states, *branch_maps(loaded, last.contrast, progress)]

    stream = ActivationStream(loaded, site, training_text, progress=progress)
    recipe = {"kind": "topk", "k": 32, "expansion": size.expansion, "steps": size.steps}
    training = train_on_text(loaded, stream, site=site, **recipe, progress=progress)
    dictionary = training.dictionary
    dictionary.model_name = model
    dictionary.save(out / "dictionary")
    evaluation = evaluate(dictionary, loaded, cut(held_out, size.judged), progress=progress)
    examples = feature_examples(dictionary, loaded, held_out, n=5, per_interval=0, logit_tokens=0, progress=progress)

    steering = steered(loaded, dictionary, contrasts, examples, held_out, progress)
    cards = [steering.feature, *(f for f in telling(examples, size.cards) if f != steering.feature)][: size.cards]
    findings = Findings(
        source=model,
        model=loaded,
        size=size,
        text=described,
        site=site,
        checked=checked,
        contrasts=contrasts,
        maps=maps,
        other_maps=other_maps,
        training=training,
        n_tokens=stream.counts().tokens,
        evaluation=evaluation,
        examples=examples,
        cards=cards,
        promoted=promotions(loaded, dictionary, cards, examples, held_out),
        steering=steering,
        seconds=time.perf_counter() - started,
    )
    return write(findings, out)


def texts(path: str | None, size: Size) -> tuple[list[str], list[str], str]:
    """Text to train on, text held out, and what they are."""
    if path is None:
        train, held_out = corpus.split()
        random.Random(0).shuffle(train)
        random.Random(0).shuffle(held_out)
        what = f"Python {platform.python_version()}'s standard library, judged on documents held out"
        return cut([d.text for d in train], size.train), cut([d.text for d in held_out], size.held_out), what
    try:
        whole = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"--text {path} cannot be read as UTF-8 text ({error}); give a text file.") from None
    if len(whole) < 10_000:
        raise BadInput(f"--text {path} has {len(whole)} characters; a dictionary needs at least 10,000 to learn from.")
    border = int(0.8 * len(whole))
    return (
        [whole[:border][: size.train]],
        [whole[border:][: size.held_out]],
        f"{Path(path).name}, judged on its last fifth",
    )


def cut(documents: list[str], n: int, longest: int = 20_000) -> list[str]:
    """The beginnings of some documents, `n` characters in all."""
    out: list[str] = []
    for document in documents:
        if n > 0:
            out.append(document[: min(longest, n)])
            n -= len(out[-1])
    return out


def check_reads_text(model: Model, name: str) -> None:
    """A tokenizer of whole words, or of token ids, has no tokens for most of a text."""
    assert model.tokenizer is not None  # `load_model` gives every model one
    backend = getattr(model.tokenizer, "backend_tokenizer", None)
    if backend is not None and type(backend.model).__name__ == "WordLevel":
        raise BadInput(f"{name} reads words of its own, not text; the demo needs a language model and its tokenizer.")


def last_scan(model: Model, name: str) -> int:
    """The last layer with a scan whose gated output can be read."""
    found = [layer.index for layer in model.layers if {"ssm.gated", "ssm.state"} <= set(layer.sites)]
    if not found:
        raise BadInput(f"{name} has no recurrent layer ({', '.join({layer.kind for layer in model.layers})} only).")
    return found[-1]
