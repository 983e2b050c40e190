"""First steps: load a model, read it, change it, ask what a prediction depends on, steer it.

Run it as it is, offline: ``python demos/first_steps.py``; or cell by cell.
"""

# %% A small hybrid language model of Python text, which ships with the package. Printing it lists every site.
from __future__ import annotations

import torch

import circuitbench as cb

model = cb.load_model("zoo:pylm-hybrid")
print(model)

# %% Does every name mean what it says on this model? Two seconds, and you know.
print(cb.check(model).raise_if_failed().ok)

# %% Look. A site's address is its attribute path; inside a trace, ask in the order the model runs.
prompt = "        line = lines[start + 1"
with torch.no_grad():
    with model.trace(prompt):
        states = model.layers[2].ssm.state.save()  # h_t at every position
        gated = model.layers[2].ssm.gated.save()  # what goes into the output projection
        logits = model.logits.save()
print("state", tuple(states.shape), "gated", tuple(gated.shape))


def expected(scores: torch.Tensor) -> str:
    """The three most likely next tokens."""
    likely = scores[0, -1].softmax(-1).topk(3)
    words = (model.tokenizer.decode([i]) for i in likely.indices.tolist())
    return ", ".join(f"{word!r} {p:.0%}" for word, p in zip(words, likely.values.tolist(), strict=True))


print("as it is:", expected(logits))

# %% Change. In place or by assignment; the state through `edit_state`, and everything after it follows.
with torch.no_grad():
    with model.trace(prompt):
        model.layers[0].ssm.y[:, 4] = 0
        changed = model.logits.save()
    with model.trace(prompt):
        model.layers[2].ssm.edit_state({5: torch.zeros_like})  # h_5 becomes 0
        forgotten = model.logits.save()
print("y of layer 0 zeroed at token 4:", expected(changed))
print("state of layer 2 forgotten at token 5:", expected(forgotten))

# %% Many prompts, many sites: `capture`. One prompt, several changes: `intervene`.
acts = cb.capture(model, [prompt, "import os"], ["layers.*.ssm.gated", "layers.-1.resid_post"])
print({address: tuple(value.shape) for address, value in acts.items()})
out = cb.intervene(model, prompt, [cb.Ablate("layers.2.ssm.y", heads=[3]), cb.Scale("layers.0.ssm.state", 0.5)])
print("the logits moved by", round(out.delta_norm, 1), "and the model expects", expected(out.logits))

# %% Which states does the prediction depend on? Put in those of a prompt with the other bracket open, one by one.
effects = cb.patch_effects(model, prompt, prompt.replace("[", "("), site="ssm.state", metric=cb.logit_diff("]", ")"))
for cell in effects.top(3):
    print(f"layer {cell.layer}, position {cell.position} {cell.token!r}: {cell.value:+.2f}")
print(f"all of it together: {effects.donor - effects.base:+.2f}")

# %% Steer. A direction: what the open bracket changes in the residual stream, the mean over some prompts.
site = "layers.2.resid_post"
prompts = [prompt, "    return self.data[index + 1", "    value = items[key, name"]
square = cb.capture(model, prompts, site, positions="last")[site]
round_ = cb.capture(model, [text.replace("[", "(") for text in prompts], site, positions="last")[site]
direction = (round_ - square).mean((0, 1))
print("plain:  ", repr(model.generate_text(prompts[1], max_new_tokens=10)))
with cb.steer(model, direction, site=site, strength=1.5):
    print("steered:", repr(model.generate_text(prompts[1], max_new_tokens=10)))
