"""RWKV-7 against the authors' package `rwkv`, which runs in a process of its own: it changes torch's settings.

scripts/peers.sh
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import circuitbench as cb
from circuitbench.architectures import ARCHITECTURES
from circuitbench.models.random import random_model
from circuitbench.models.rwkv7 import RwkvTokenizer
from tests.architectures.cases import prompts
from tests.models import rwkv7_reference

pytestmark = [
    pytest.mark.peer,
    pytest.mark.skipif(importlib.util.find_spec("rwkv") is None, reason="the package rwkv is not installed"),
]

THEIRS = """
import sys
import torch
from rwkv.model import RWKV

torch.set_num_threads(1)
model = RWKV(model=sys.argv[1], strategy="cpu fp32")
ids = torch.load(sys.argv[2])
logits, state = model.forward(ids, None, full_output=True)
last, after = model.forward(7, [tensor.clone() for tensor in state])
torch.save((logits, state, last), sys.argv[3])
"""
TEXTS = """
import json
import sys
from rwkv.rwkv_tokenizer import TRIE_TOKENIZER

tokenizer = TRIE_TOKENIZER(sys.argv[1])
json.dump([tokenizer.encode(text) for text in json.load(open(sys.argv[2]))], open(sys.argv[3], "w"))
"""
SETTINGS = {"RWKV_V7_ON": "1", "RWKV_JIT_ON": "0", "RWKV_CUDA_ON": "0"}


def run(code: str, *arguments: Path) -> None:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    subprocess.run(command, check=True, env={**os.environ, **SETTINGS}, stdout=subprocess.DEVNULL)


def test_logits_and_states_are_the_authors_packages(tmp_path: Path) -> None:
    hf = random_model(ARCHITECTURES["rwkv7"], hidden_size=128, head_dim=64)
    torch.save(rwkv7_reference.authors_state(hf.state_dict()), tmp_path / "tiny.pth")
    (prompt,) = prompts(80)  # two chunks of the scan and a rest
    torch.save(prompt, tmp_path / "ids.pt")
    run(THEIRS, tmp_path / "tiny", tmp_path / "ids.pt", tmp_path / "out.pt")
    logits, state, last = torch.load(tmp_path / "out.pt")
    ours = cb.load_model(tmp_path / "tiny.pth").hf
    with torch.no_grad():
        out = ours(torch.tensor([prompt]), use_cache=True)
        cache = out.past_key_values
        found = [(out.logits[0], logits)]
        for layer in range(3):
            shift, matrix, feed_forward = state[3 * layer : 3 * layer + 3]
            found.append((cache.get_recurrent_state(layer)[0].clone(), matrix.mT))  # theirs has the values first
            found.append((cache.get_conv_state(layer, 0)[0, :, 0].clone(), shift))
            found.append((cache.get_conv_state(layer, 1)[0, :, 0].clone(), feed_forward))
        found.insert(1, (ours(torch.tensor([[7]]), past_key_values=cache).logits[0, 0], last))
    off = [(a - b).abs().max().item() for a, b in found]
    print(f"logits: off by {off[0]:.1e} (one more token: {off[1]:.1e}), the largest is {logits.abs().max():.2f}")
    assert max(off) <= 1e-5


def test_tokens_are_the_authors_packages(tmp_path: Path) -> None:
    spec = importlib.util.find_spec("rwkv")
    assert spec is not None and spec.origin is not None
    vocabulary = Path(spec.origin).with_name("rwkv_vocab_v20230424.txt")
    texts = [path.read_text(encoding="utf-8") for path in sorted(Path(__file__).parent.glob("*.py"))[:3]]
    texts += ["Ümläute und 日本語のテキスト 😀\t\x07", "\n\nUser: hi\n\nAssistant:", " ", "a" * 300, "\x00"]
    (tmp_path / "texts.json").write_text(json.dumps(texts))
    run(TEXTS, vocabulary, tmp_path / "texts.json", tmp_path / "ids.json")
    tokenizer = RwkvTokenizer(vocabulary)
    for text, expected in zip(texts, json.loads((tmp_path / "ids.json").read_text()), strict=True):
        assert tokenizer(text)["input_ids"] == expected
        assert tokenizer.decode(expected) == text
