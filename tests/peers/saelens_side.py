"""Runs in SAELens' environment: what it makes of our folders, and folders of its own with what it makes of them.

python saelens_side.py FOLDER, which holds x.safetensors and ours/<name>/. Writes answers/ours/<name>.safetensors,
resaved/<name>/, theirs/<name>/ and answers/theirs/<name>.safetensors.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

D_IN, D_OUT, D_SAE, K = 32, 24, 128, 8
SAES = {
    "standard": {},
    "standard, b_dec not subtracted": {"apply_b_dec_to_input": False},
    "gated": {},
    "gated, b_dec not subtracted": {"apply_b_dec_to_input": False},
    "topk": {"k": K},
    "topk, rescaled": {"k": K, "rescale_acts_by_decoder_norm": True},
    "abstopk": {"k": K},
    "abstopk, rescaled": {"k": K, "rescale_acts_by_decoder_norm": True},
    "abstopk, b_dec not subtracted": {"k": K, "apply_b_dec_to_input": False},
    "matching_pursuit": {},
    "matching_pursuit, few rounds": {"max_iterations": 5},
    "matching_pursuit, until little is left": {"residual_threshold": 1.0, "stop_on_duplicate_support": False},
    "matching_pursuit, all rounds": {"residual_threshold": 0.0, "stop_on_duplicate_support": False},
    "matching_pursuit, b_dec not subtracted": {"max_iterations": 9, "apply_b_dec_to_input": False},
    "jumprelu": {},
    "jumprelu, b_dec not subtracted": {"apply_b_dec_to_input": False},
    "transcoder": {"d_out": D_OUT, "apply_b_dec_to_input": False},
    "skip_transcoder": {"d_out": D_OUT, "apply_b_dec_to_input": False},
    "jumprelu_transcoder": {"d_out": D_OUT, "apply_b_dec_to_input": False},
    "jumprelu_skip_transcoder": {"d_out": D_OUT, "apply_b_dec_to_input": False},
}
TRAINED = {
    "standard": {},
    "gated": {},
    "topk": {"k": K},
    "topk, not rescaled": {"k": K, "rescale_acts_by_decoder_norm": False},
    "abstopk": {"k": K},
    "batchtopk": {"k": K},
    "matching_pursuit": {"residual_threshold": 0.5},
    "jumprelu": {},
    "matryoshka_batchtopk": {"k": K, "matryoshka_widths": [32, D_SAE]},
}
REFUSED = {
    "temporal": {"n_heads": 2, "bottleneck_factor": 4},
    "standard, layer_norm": {"normalize_activations": "layer_norm"},
    "standard, constant_norm_rescale": {"normalize_activations": "constant_norm_rescale"},
}


@torch.no_grad()
def scramble(sae: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    for name, tensor in [*sae.named_parameters(), *sae.named_buffers()]:
        noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        tensor.copy_(0.3 + 0.1 * noise if "threshold" in name else 0.3 * noise)
    if sae.cfg.architecture() == "matching_pursuit":
        sae.W_dec /= sae.W_dec.norm(dim=1, keepdim=True)


def answers(sae: Any, x: torch.Tensor, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with torch.no_grad():
        found = {"features": sae.encode(x), "out": sae(x)}
    save_file({name: tensor.contiguous() for name, tensor in found.items()}, path)


def main(root: Path) -> None:
    # Here, because the tests read the cases above where there is no SAELens.
    from sae_lens import SAE
    from sae_lens.registry import get_sae_class, get_sae_training_class

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    x = load_file(root / "x.safetensors")["x"]
    for folder in sorted((root / "ours").iterdir()):
        sae = SAE.load_from_disk(folder)
        answers(sae, x, root / "answers" / "ours" / f"{folder.name}.safetensors")
        sae.save_model(root / "resaved" / folder.name)
    for folder in sorted((root / "only ours").iterdir()):
        try:
            SAE.load_from_disk(folder)
        except Exception as error:  # noqa: BLE001 - which one it is, is what the test asks
            (root / f"{folder.name}.error").write_text(repr(error))
    sizes = {"d_in": D_IN, "d_sae": D_SAE}
    for name, options in {**SAES, **REFUSED}.items():
        cls, config = get_sae_class(name.split(",")[0])
        sae = cls(config(**sizes, **options))
        scramble(sae)
        sae.cfg.metadata.hook_name = "layers.1.mixer"
        sae.save_model(root / "theirs" / name)
        if name in SAES:
            answers(sae, x, root / "answers" / "theirs" / f"{name}.safetensors")
    for name, options in TRAINED.items():
        cls, config = get_sae_training_class(name.split(",")[0])
        sae = cls(config(**sizes, **options))
        scramble(sae)
        folder = root / "theirs" / f"trained {name}"
        sae.save_inference_model(folder)
        answers(SAE.load_from_disk(folder), x, root / "answers" / "theirs" / f"{folder.name}.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
