"""Runs where sparsify and dictionary_learning are: folders as they save them, and what they make of x.

python sparsify_side.py FOLDER, which holds x.safetensors. Writes theirs/<name>/ and answers/<name>.safetensors.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

D, L, K = 32, 128, 8
SPARSIFY: dict[str, dict[str, Any]] = {
    "sparsify": {},
    "sparsify, by expansion": {"num_latents": 0, "expansion_factor": 4},
    "sparsify, skip": {"skip_connection": True},
    "sparsify, transcoder": {"transcode": True},
    "sparsify, skip transcoder": {"transcode": True, "skip_connection": True},
}
LEARNED = (
    "AutoEncoder",
    "AutoEncoderNew",
    "GatedAutoEncoder",
    "JumpReluAutoEncoder",
    "AutoEncoderTopK",
    "BatchTopKSAE",
    "MatryoshkaBatchTopKSAE",
)


@torch.no_grad()
def scramble(module: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if tensor.is_floating_point():
            noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            tensor.copy_(0.3 + 0.1 * noise if "threshold" in name else 0.3 * noise)


def main(root: Path) -> None:
    # Here, because the tests read the cases above where neither is installed.
    import dictionary_learning.dictionary as learned
    from dictionary_learning.trainers.batch_top_k import BatchTopKSAE
    from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE
    from dictionary_learning.trainers.top_k import AutoEncoderTopK
    from sparsify import SparseCoder, SparseCoderConfig

    torch.set_num_threads(1)
    x = load_file(root / "x.safetensors")["x"]
    (root / "answers").mkdir()

    def answer(name: str, features: torch.Tensor, out: torch.Tensor) -> None:
        found = {"features": features.detach().contiguous(), "out": out.detach().contiguous()}
        save_file(found, root / "answers" / f"{name}.safetensors")

    for name, options in SPARSIFY.items():
        coder = SparseCoder(D, SparseCoderConfig(**({"num_latents": L, "k": K} | options)))
        scramble(coder)
        coder.save_to_disk(root / "theirs" / name)
        coder = SparseCoder.load_from_disk(root / "theirs" / name)
        code = coder.encode(x)
        features = torch.zeros(len(x), L).scatter(1, code.top_indices, code.top_acts)
        answer(name, features, coder(x).sae_out)

    made = {
        "AutoEncoderTopK": lambda: AutoEncoderTopK(D, L, K),
        "BatchTopKSAE": lambda: BatchTopKSAE(D, L, K),
        "MatryoshkaBatchTopKSAE": lambda: MatryoshkaBatchTopKSAE(D, L, K, [32, 96]),
    }
    for name in LEARNED:
        module = made[name]() if name in made else getattr(learned, name)(D, L)
        scramble(module)
        folder = root / "theirs" / name
        folder.mkdir(parents=True)
        torch.save(module.state_dict(), folder / "ae.pt")
        (folder / "config.json").write_text(json.dumps({"trainer": {"dict_class": name, "k": K, "lm_name": "a/b"}}))
        answer(name, module.encode(x), module(x))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
