"""The recurrences run where circuitbench is not installed, as they do on a remote server."""

from __future__ import annotations

import subprocess
import sys

import nnsight
import torch
from nnsight.intervention.serialization import dumps

from circuitbench.recurrences import RECURRENCES
from tests.recurrences.cases import BY_CHANNEL, NAMES, case
from tests.recurrences.stepwise_cases import DEEP, STEPWISE, deep_case

SERVER = """
import sys
sys.modules["circuitbench"] = sys.modules["tests"] = None
import torch
from nnsight.intervention.serialization import loads
torch.save(loads(open(sys.argv[1], "rb").read())(), sys.argv[2])
"""


def test_every_verb_travels_by_source_and_gives_the_same_numbers(tmp_path) -> None:
    nnsight.register("circuitbench")
    nnsight.register("tests")
    operands = {name: case(name).operands for name in NAMES}
    mask = torch.arange(37) < 9
    stepwise, deep = dict(STEPWISE), deep_case()

    def job() -> dict:
        results = {}
        for name, module in RECURRENCES.items():
            layer = {key: value.clone().requires_grad_() for key, value in operands[name].items()}
            y, final = module.forward(**layer, edits={3: torch.zeros_like})
            grads = torch.autograd.grad(y.sum() + final.sum(), list(layer.values()))
            results[name] = [y, final, *grads]
            if "initial_scale" in layer:
                results[name] += [module.scale_of(**layer)]
            results[name] += [part for _, part in module.iter_states(**layer, chunk=8)]
            results[name] += [module.states(**layer), module.decay_of(**layer), module.write_of(**layer)]
            results[name] += [module.adjoint(**layer, grad_y=y), *module.frozen(**layer)]
            results[name] += module.knockout(**layer, sources=mask, destinations=~mask)
            results[name] += [module.mixing(**layer, **({"channels": [1]} if name in BY_CHANNEL else {}))]
        for name, recurrence in stepwise.items():
            layer = operands[name]
            y, final = recurrence.forward(**layer, edits={3: torch.zeros_like}, write=recurrence.write_of(**layer))
            found = [y, final, recurrence.states(**layer), recurrence.decay_of(**layer)]
            found += [part for _, part in recurrence.iter_states(**layer, chunk=8)]
            found += [recurrence.adjoint(**layer, grad_y=y), *recurrence.frozen(**layer)]
            found += recurrence.knockout(**layer, sources=mask, destinations=~mask)
            results[f"{name}, stepwise"] = [*found, recurrence.mixing(**layer, channels=[1])]
        adjoint = DEEP.adjoint(**deep[0], grad_y=deep[0]["x"], initial_state=deep[1])
        results["deep"] = [*DEEP.forward(**deep[0], initial_state=deep[1]), adjoint]
        return {name: [value.detach() for value in found] for name, found in results.items()}

    code, out = tmp_path / "job", tmp_path / "out.pt"
    code.write_bytes(dumps(job))
    subprocess.run([sys.executable, "-c", SERVER, code, out], check=True, cwd=tmp_path)
    there, here = torch.load(out), job()
    assert there.keys() == here.keys()
    for name in there:
        for a, b in zip(there[name], here[name], strict=True):
            torch.testing.assert_close(a, b)
