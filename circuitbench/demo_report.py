"""The demo's findings in words, figures and numbers."""

from __future__ import annotations

import json
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import viewer
from .circuits import Effect, EffectMap
from .dictionaries import Evaluation
from .errors import BadInput
from .tracing.checks.report import COLUMNS
from .viewer.text import number, running

if TYPE_CHECKING:
    from .demo import Findings
    from .demo_measures import Measured

PARTS = {"ssm.out": "recurrent mixer", "attn.out": "attention", "mlp.out": "MLP"}
ELSE = "For contrast, the last pair. "
SITES = {
    "ssm.state": (
        "State",
        "Each cell is a run: the state after that token, in that layer, is the other prompt's, and all that follows is "
        "computed from it.",
    ),
    "mlp.out": ("MLP", "What the layer's MLP adds at that token is the other prompt's."),
}
MIXER = "Token mixer", "What the layer's mixer, recurrent or attention, adds at that token is the other prompt's."
MIXERS = {"ssm": "recurrent mixer", "attention": "attention"}


def write(findings: Findings, out: Path) -> Path:
    """Write ``report.html`` and ``findings.json``; returns where the report is."""
    page = viewer.write_report(out / "report.html", report_of(findings))
    (out / "findings.json").write_text(json.dumps(numbers(findings), indent=2) + "\n", encoding="utf-8")
    return page


def report_of(findings: Findings) -> viewer.Report:
    """The page."""
    hf, dictionary = findings.model.hf, findings.training.dictionary
    return viewer.Report(
        model=findings.source,
        layers=[layer.kind for layer in findings.model.layers],
        made=datetime.now(),
        seconds=findings.seconds,
        versions={name: version(name) for name in ("torch", "transformers", "nnsight")},
        summary=summary(findings),
        facts={
            "family": hf.config.model_type,
            "parameters": f"{sum(parameter.numel() for parameter in hf.parameters()):,}",
            "dictionary": f"TopK, {dictionary.d_dict:,} features, of {findings.site}",
            "text": findings.text,
        },
        checks=site_checks(findings),
        prompts=[prompt_pair(one) for one in findings.contrasts],
        effects=effect_maps(findings),
        training=viewer.Training(
            f"A TopK autoencoder with {dictionary.settings['k']} of {dictionary.d_dict:,} features active on a token, "
            f"trained on what {findings.site} holds at {findings.n_tokens:,} tokens of text.",
            findings.training.history,
        ),
        evaluation=viewer.Evaluation(
            f"On {findings.evaluation.reconstruction.n_rows:,} tokens of text that was not trained on.",
            metrics(findings.evaluation),
            findings.evaluation.density,
        ),
        features=[card(findings, feature) for feature in findings.cards],
        steering=[
            viewer.Steering(steering_words(findings, what, first=place == 0), prompt, plain, steered)
            for place, (what, prompt, plain, steered) in enumerate(findings.steering.texts)
        ],
        snippets=snippets(findings),
    )


def percent(share: float) -> str:
    """A share as a whole number of percent."""
    return f"{round(100 * share)} %" if share == 0 or share >= 0.005 else "less than 1 %"


def quoted(text: str) -> str:
    """A piece of a prompt as it is shown in a sentence."""
    return f"“{running(text.strip(' '))}”"


def summary(findings: Findings) -> list[str]:
    """What was found, for someone who reads nothing else."""
    main, other, steering, evaluation = findings.main, findings.other, findings.steering, findings.evaluation
    assert main.states is not None
    state = main.states.top(1)[0]
    reader, read = last_reader(findings)
    answer, wrong = quoted(main.contrast.answer), quoted(main.contrast.wrong)
    costs = evaluation.ce_spliced - evaluation.ce_clean, evaluation.ce_ablated["zero"] - evaluation.ce_clean
    return [
        f"After {quoted(main.contrast.clean)} the model expects {answer} ({percent(main.answered[0])}), after "
        f"{quoted(main.contrast.corrupt)} it expects {wrong} ({percent(main.answered[1])}). Part of what it goes by "
        f"travels in the recurrent state: the other prompt's state, put in at one position of layer {state.layer}, "
        f"makes {percent(main.carried)} of the difference.",
        f"It does so least in {quoted(other.contrast.clean)}, where {quoted(other.contrast.answer)} comes next: the "
        f"strongest state makes {percent(abs(other.carried))} there, and at the last token, {reader} makes "
        f"{percent(read)}.",
        f"A dictionary of {findings.training.dictionary.d_dict:,} features leaves {percent(evaluation.fvu)} of the "
        f"variance of {findings.site} unexplained. Running on it costs the model {number(costs[0])} nats a token, "
        f"doing without the site {number(costs[1])}. Its feature {steering.feature} is one on which the "
        f"preference for {answer} over {wrong} hangs: suppressed while the model writes, it turns "
        f"{len(steering.turned)} of {len(steering.family)} prompts from {answer} to {wrong}.",
    ]


def last_reader(findings: Findings) -> tuple[str, float]:
    """The branch with the largest effect at the contrasting prompt's last token, and its share of the difference."""
    found: list[tuple[Effect, EffectMap]] = []
    for effects in findings.other_maps[1:]:
        last = len(effects.tokens) - 1
        found += [(cell, effects) for cell in effects.top(effects.values.numel()) if cell.position == last]
    cell, effects = max(found, key=lambda pair: abs(pair[0].value))
    kind = findings.model.layers[cell.layer].kind
    part = PARTS.get(effects.site) or MIXERS[kind]
    return f"the {part} of layer {cell.layer}", cell.value / (findings.other.donor - findings.other.base)


def site_checks(findings: Findings) -> list[viewer.SiteCheck]:
    """What was verified, a line a site: what all sites share in columns, what is special beside them."""
    sites: dict[str, list[Any]] = {}
    for row in findings.checked.rows:
        sites.setdefault(row.site, []).append(row)
    return [
        viewer.SiteCheck(
            site,
            {COLUMNS[row.check]: row.ok for row in rows if row.check in COLUMNS},
            "; ".join(row.check for row in rows if row.check not in COLUMNS),
        )
        for site, rows in sites.items()
    ]


def prompt_pair(one: Measured) -> viewer.PromptPair:
    """A row of the table of prompts."""
    contrast = one.contrast
    return viewer.PromptPair(
        contrast.clean.strip(" "),
        contrast.answer,
        one.answered[0],
        contrast.corrupt.strip(" "),
        contrast.wrong,
        one.answered[1],
        one.carried,
    )


def effect_maps(findings: Findings) -> list[viewer.EffectMap]:
    """The heat maps of both prompts; those of one site in colours of one scale, the share of the whole difference."""
    pairs = [(findings.main, findings.maps), (findings.other, findings.other_maps)]
    shares: dict[str, float] = {}
    for one, maps in pairs:
        for effects in maps:
            share = abs(effects.top(1)[0].value / (one.donor - one.base))
            shares[effects.site] = max(share, shares.get(effects.site, 0.0))
    return [
        effect_map(
            effects, one, shares[effects.site] * abs(one.donor - one.base), lead="" if one is pairs[0][0] else ELSE
        )
        for one, maps in pairs
        for effects in maps
    ]


def effect_map(effects: EffectMap, one: Measured, largest: float, lead: str) -> viewer.EffectMap:
    """A heat map and what to see in it."""
    best = effects.top(1)[0]
    what, done = SITES.get(effects.site, MIXER)
    share = f", {percent(abs(best.value / (one.donor - one.base)))} of the difference between the prompts"
    if effects.donor is None:
        what, done, share = "State set to zero", "The same with zeros in the place of the state.", ""
    return viewer.EffectMap(
        title=lead + what,
        description=f"{done} Largest: {number(best.value)} at layer {best.layer}, after {quoted(best.token)}{share}.",
        unit=f"change of the {effects.metric}, {number(effects.base)} unchanged",
        tokens=effects.tokens,
        values=effects.values,
        lacks={"ssm.state": "state", "mlp.out": "MLP"}.get(effects.site, effects.site),
        largest=largest,
    )


def metrics(evaluation: Evaluation) -> list[viewer.Metric]:
    """The evaluation as a table."""

    def recovered(ablation: str) -> str:
        try:
            return f"{100 * evaluation.ce_recovered(ablation):.1f} %"
        except BadInput:
            return "not defined: the model does not get worse"

    zero, mean = (evaluation.ce_ablated[name] for name in ("zero", "mean"))
    return [
        viewer.Metric(
            "FVU", f"{evaluation.fvu:.3f}", "squared error of the reconstruction, as a share of the variance"
        ),
        viewer.Metric("L0", f"{evaluation.l0:.1f}", "features active on a token, the mean"),
        viewer.Metric("dead", f"{100 * evaluation.dead_share:.1f} %", "features active on no token of this text"),
        viewer.Metric("CE clean", f"{evaluation.ce_clean:.3f}", "the model's loss, nats a token"),
        viewer.Metric(
            "CE spliced", f"{evaluation.ce_spliced:.3f}", "its loss with the site replaced by its reconstruction"
        ),
        viewer.Metric("CE zero", f"{zero:.3f}", "its loss with the site set to zero"),
        viewer.Metric("CE mean", f"{mean:.3f}", "its loss with the site set to its mean over this text"),
        viewer.Metric("recovered, zero", recovered("zero"), "(CE zero − CE spliced) / (CE zero − CE clean)"),
        viewer.Metric("recovered, mean", recovered("mean"), "(CE mean − CE spliced) / (CE mean − CE clean)"),
        viewer.Metric(
            "KL", f"{evaluation.kl:.3f}", "of the next-token distributions, clean from spliced, nats a token"
        ),
    ]


def card(findings: Findings, feature: int) -> viewer.FeatureCard:
    """A feature: where it is strongest, and what adding it does to the next token."""
    tokenizer = findings.model.tokenizer
    assert tokenizer is not None  # `load_model` gives every model one

    def text(index: int) -> str:
        return str(tokenizer.decode([index]))

    moved = findings.promoted[feature]
    up, down = moved.topk(6), (-moved).topk(6)
    note = ""
    if feature == findings.steering.feature:
        contrast = findings.main.contrast
        note = f"{quoted(contrast.answer)} rather than {quoted(contrast.wrong)} hangs on this one: see Steering."
    return viewer.FeatureCard(
        index=feature,
        density=findings.examples.density[feature].item(),
        examples=[
            viewer.Example([text(i) for i in one.token_ids], one.activations, one.peak)
            for one in findings.examples.of(feature)
        ],
        promoted=[(text(i), v) for i, v in zip(up.indices.tolist(), up.values.tolist(), strict=True)],
        suppressed=[(text(i), -v) for i, v in zip(down.indices.tolist(), down.values.tolist(), strict=True)],
        note=note,
    )


def steering_words(findings: Findings, what: str, first: bool) -> str:
    """What was done to a text."""
    steering, main = findings.steering, findings.main
    if not first:
        return f"Feature {steering.feature} {what}."
    answer, wrong = quoted(main.contrast.answer), quoted(main.contrast.wrong)
    return (
        f"Of {steering.tried} features that tell the prompts apart, feature {steering.feature} turns most of the "
        f"{len(steering.family)} prompts at the least cost elsewhere. Removed at the last token alone, with the "
        f"activation it has there, it changes the preference for {answer} by {number(steering.effect)} on average. "
        f"Suppressed by {steering.factor} × its largest activation, it turns {len(steering.turned)} of them to "
        f"{wrong}, and costs {number(steering.cost)} nats a token on other text. Here it is {what}."
    )


def snippets(findings: Findings) -> list[viewer.Snippet]:
    """The same by hand."""
    contrast, steering, k = findings.main.contrast, findings.steering, findings.training.dictionary.settings["k"]
    return [
        viewer.Snippet(
            "The first map",
            "import circuitbench as cb\n\n"
            f"model = cb.load_model({findings.source!r})\n"
            f"effects = cb.patch_effects(\n    model,\n    {contrast.clean!r},\n    {contrast.corrupt!r},\n"
            f'    site="ssm.state",\n    metric=cb.logit_diff({contrast.answer!r}, {contrast.wrong!r}),\n)\n'
            "effects.top(5)",
        ),
        viewer.Snippet(
            "Steering with the dictionary beside this page",
            'sae = cb.dictionaries.load_dictionary("dictionary")\n'
            f"strength = {-steering.factor * steering.largest:.1f}\n"
            f"with cb.steer(model, sae, feature_id={steering.feature}, strength=strength):\n"
            f"    print(model.generate_text({contrast.clean!r}, max_new_tokens=24))",
        ),
        viewer.Snippet(
            "A dictionary of your own",
            f'sae = cb.train_sae(model, "{findings.site}", text, k={k}, expansion={findings.size.expansion}, '
            f"steps={findings.size.steps})\nprint(cb.evaluate(sae, model, held_out_text))",
        ),
    ]


def numbers(findings: Findings) -> dict[str, Any]:
    """The findings for programs."""
    evaluation, steering = findings.evaluation, findings.steering
    return {
        "model": findings.source,
        "site": findings.site,
        "seconds": findings.seconds,
        "contrasts": [
            {
                **vars(one.contrast),
                "answered": one.answered,
                "base": one.base,
                "donor": one.donor,
                "carried_by_one_state": one.carried,
            }
            for one in findings.contrasts
        ],
        "effects": [
            {"site": one.site, "base": one.base, "donor": one.donor, "top": [cell._asdict() for cell in one.top(5)]}
            for one in findings.maps
        ],
        "evaluation": {
            **{name: getattr(evaluation, name) for name in ("fvu", "l0", "dead_share", "ce_clean", "ce_spliced", "kl")},
            "ce_ablated": dict(evaluation.ce_ablated),
        },
        "steering": {
            **{name: getattr(steering, name) for name in ("feature", "tried", "effect", "largest", "factor", "cost")},
            "turned": len(steering.turned),
            "family": len(steering.family),
            "texts": steering.texts,
        },
    }
