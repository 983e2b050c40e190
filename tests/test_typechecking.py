"""The run-time shape checks see what they should, and disturb neither traces nor code that travels."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from types import FunctionType, ModuleType

import pytest
import torch
from beartype import beartype
from jaxtyping import Float, TypeCheckError, jaxtyped
from nnsight import TransformersModel
from nnsight.intervention.serialization import dumps, loads
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

import circuitbench
from circuitbench.recurrences import ssd
from tests.ndif.plugin import byte_tokenizer

MODULES = [info.name for info in pkgutil.walk_packages(circuitbench.__path__, "circuitbench.")]


def functions(module: ModuleType) -> list[FunctionType]:
    """The functions and methods written in a module."""
    members = []
    for value in vars(module).values():
        members += vars(value).values() if inspect.isclass(value) else [value]
    members = [getattr(member, "fget", None) or getattr(member, "__func__", member) for member in members]
    return [m for m in members if isinstance(m, FunctionType) and m.__module__ == module.__name__]


@pytest.mark.parametrize("name", MODULES)
def test_every_shape_in_a_signature_can_be_resolved(name: str) -> None:
    # Otherwise jaxtyping leaves the annotation as the string it was, and checks nothing.
    module = importlib.import_module(name)
    for function in functions(module):
        for annotation in inspect.get_annotations(function).values():
            if isinstance(annotation, str) and re.search(r"\w\[\w*Tensor, ", annotation):
                eval(annotation, vars(module))


def test_a_wrong_shape_is_refused() -> None:
    x, dt, A, B = torch.zeros(1, 5, 2, 3), torch.zeros(1, 5, 2), torch.zeros(2), torch.zeros(1, 5, 1, 4)
    ssd.forward(x, dt, A, B, B)
    with pytest.raises(TypeCheckError, match="dt"):
        ssd.forward(x, dt[:, :4], A, B, B)


@jaxtyped(typechecker=beartype)
def read(block) -> Float[Tensor, "b t d"]:
    return doubled(block.output)


@jaxtyped(typechecker=beartype)
def doubled(x: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
    return 2 * x


@pytest.mark.parametrize("remote", [False, "local"])
def test_checked_functions_read_in_invokes_of_different_sizes(remote: bool | str) -> None:
    config = GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=257, bos_token_id=256, eos_token_id=256)
    model = TransformersModel(GPT2LMHeadModel(config).eval(), tokenizer=byte_tokenizer(), task="text-generation")
    block = model.transformer.h[0]
    with model.trace(remote=remote) as tracer:
        with tracer.invoke(["one", "two"]):
            two = read(block).save()
        with tracer.invoke("one"):
            one = read(block).save()
    torch.testing.assert_close(two[:1], one)
    assert two.shape == (2, 3, 16)


def test_a_checked_function_travels_with_the_globals_it_was_written_with() -> None:
    class Block:
        output = torch.ones(1, 2, 3)

    function = loads(dumps(read))
    assert function is not read
    assert torch.equal(function(Block), 2 * Block.output)
