"""The same block here, and on a server: NDIF (https://ndif.us), or one of your own that speaks its protocol.

``python demos/remote.py`` runs offline, with ``remote="local"``: everything is serialised, sent nowhere, and run from
what would have been sent. ``python demos/remote.py remote`` runs on NDIF (put your key into NDIF_API_KEY; the model has
to be one that NDIF serves), ``python demos/remote.py http://my-server:5001`` on another server.

The server needs to know nothing of circuitbench. What a block names of it (the views of the sites, the recurrences)
travels with the request, as source; what comes back is plain tensors.
"""

# %% Where to run, and which model. For a server the weights stay where they are: here they are on the meta device.
from __future__ import annotations

import sys

import torch

import circuitbench as cb

asked = sys.argv[1] if len(sys.argv) > 1 else "local"
where = True if asked == "remote" else asked
name = "zoo:pylm-hybrid" if where == "local" else "state-spaces/mamba2-130m-hf"
model = cb.load_model(name, remote=where != "local")
prompt = "def read(path):\n    return open("

# %% A block of your own: `remote=` is all that differs. A state edit replays the recurrence on the server.
with torch.no_grad():
    with model.trace(prompt, remote=where):
        states = model.layers[0].ssm.edit_state({3: torch.zeros_like}).save()  # h_3 becomes 0, all later ones follow
        model.layers[2].ssm.y[:, 4] = 0
        logits = model.logits.save()
print("state", tuple(states.shape), "h_3 is zero:", bool((states[:, 3] == 0).all()))

# %% Every function of ours takes it too.
acts = cb.capture(model, [prompt, "import os"], "layers.*.ssm.gated", remote=where)
effects = cb.patch_effects(
    model, prompt, prompt.replace("path", "name"), site="ssm.out", metric=cb.logit_diff("path", "name"), remote=where
)
print({address: tuple(value.shape) for address, value in acts.items()})
print(effects.top(2))

# %% Held interventions are edits of the model; they go along with whatever runs inside the block.
with cb.hold(model, cb.Ablate("layers.0.ssm.y", heads=[1])):
    print(repr(model.generate_text(prompt, max_new_tokens=8, remote=where)))

# %% The same numbers as here, if the model is here.
if where == "local":
    here = cb.capture(model, [prompt, "import os"], "layers.*.ssm.gated")
    print("as here:", all(torch.allclose(acts[a], here[a], atol=1e-5, equal_nan=True) for a in here))
