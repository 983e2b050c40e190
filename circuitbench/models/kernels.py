"""Which code runs a scan, and whether it can run where the model is.

transformers chooses a kernel package (mamba-ssm, causal-conv1d, flash-linear-attention) once, when a family's code is
imported, and never looks at the device: with such a package installed, a model on the CPU is handed to CUDA code and
crashes. On the CPU, its own S6 path is slow, and its backward is quadratic in the length.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from ..errors import KernelMismatch
from ..recurrences import s6

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor
    from transformers import PreTrainedModel

# transformers' names of the functions that a kernel package may replace.
KERNEL_FUNCTIONS = (
    "causal_conv1d_fn",
    "causal_conv1d_update",
    "mamba_selective_scan",
    "mamba_selective_state_update",
    "mamba_inner_fn",
    "mamba2_chunk_scan",
    "mamba2_selective_state_update",
    "mamba2_split_conv1d_scan_combined",
    "torch_chunk_gated_delta_rule",
    "torch_recurrent_gated_delta_rule",
    "chunk_kimi_delta_attention",
    "recurrent_kimi_delta_attention",
)
MARK, HOOKED = "circuitbench", "circuitbench_gradients"
CACHES = {"rwkv": "state", "xlstm": "cache_params"}  # written in place


def modeling_module(hf: PreTrainedModel) -> Any:
    """The Python module that holds the family's code; its functions are looked up there at every call."""
    return sys.modules[type(hf).__module__]


def kernel_package(function: Any) -> str | None:
    """The package whose kernel stands behind one of transformers' functions, or ``None`` for its torch code."""
    code, cells = getattr(function, "__code__", None), getattr(function, "__closure__", None)
    if code is None or cells is None:
        return None
    held = dict(zip(code.co_freevars, (cell.cell_contents for cell in cells), strict=True))
    return held.get("package") if held.get("is_new_implementation") else None


def mismatched(hf: PreTrainedModel) -> dict[str, str]:
    """Functions whose kernels cannot run on this model's device, with the package each comes from."""
    if next(hf.parameters()).device.type != "cpu":
        return {}
    module = modeling_module(hf)
    found = {name: kernel_package(getattr(module, name, None)) for name in KERNEL_FUNCTIONS}
    return {name: package for name, package in found.items() if package is not None}


def use_torch_kernels(hf: PreTrainedModel) -> None:
    """Put transformers' own torch functions in the place of installed kernels, for this family, in this process."""
    module = modeling_module(hf)
    for name in KERNEL_FUNCTIONS:
        function = getattr(module, name, None)
        if function is not None and kernel_package(function) is not None:
            setattr(module, name, function.__wrapped__)


def fit(hf: PreTrainedModel) -> None:
    """Make sure that the family's scan can run where the model is, and that S6 on the CPU runs our scan.

    Raises:
        KernelMismatch: If an installed kernel package would be called with tensors it cannot take.
    """
    wrong = mismatched(hf)
    if wrong:
        packages = ", ".join(sorted(set(wrong.values())))
        raise KernelMismatch(
            f"{packages} is installed, so transformers would run {', '.join(wrong)} with its CUDA kernels, but the "
            "model is on the CPU; call circuitbench.models.kernels.use_torch_kernels(hf_model), or move it to a GPU."
        )
    use_fast_s6(hf)


def allow_gradients(hf: PreTrainedModel) -> None:
    """RWKV-4 and xLSTM keep no cache where gradients are wanted and nobody asks for one.

    transformers makes one for every forward in eval mode, and writes it into tensors that the backward needs. xLSTM in
    half precision cannot run without (its empty state is float32 then), so it gets one that forgets what is written.
    """
    if hf.config.model_type not in CACHES or hasattr(hf, HOOKED):
        return
    name = CACHES[hf.config.model_type]

    def without_cache(module: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        asked = kwargs.get("use_cache") is not None or kwargs.get(name) is not None
        if asked or not torch.is_grad_enabled():
            return args, kwargs
        kwargs = {**kwargs, "use_cache": False}
        if name == "cache_params" and module.dtype != torch.float32:
            given = next(v for v in (*args, kwargs.get("input_ids"), kwargs.get("inputs_embeds")) if v is not None)
            cache = modeling_module(module).xLSTMCache(module.config, len(given), module.dtype, module.device)
            cache.rnn_state = Forgetful(cache.rnn_state)
            kwargs[name] = cache
        return args, kwargs

    def dropped(module: Any, args: tuple, output: Any) -> None:
        if isinstance(getattr(getattr(output, name, None), "rnn_state", None), Forgetful):
            output[name] = None

    hf.register_forward_pre_hook(without_cache, with_kwargs=True)
    hf.register_forward_hook(dropped)
    setattr(hf, HOOKED, without_cache)


class Forgetful(dict):
    """States that stay as they are: whoever asks for one gets a copy."""

    def __getitem__(self, layer: int) -> Any:
        return tuple(value.clone() for value in super().__getitem__(layer))


def run_whole(hf: Any) -> None:
    """xLSTM runs a prompt in one piece, however long, so that every layer runs once a forward and has gradients.

    transformers cuts prompts of more than ``max_inference_chunksize`` (16,384) tokens into pieces to save memory.
    """
    if hf.config.model_type == "xlstm" and hf.device.type != "meta":
        hf.config.max_inference_chunksize = sys.maxsize


def use_fast_s6(hf: PreTrainedModel) -> None:
    """Let the family's S6 scan run ours for CPU tensors: the same numbers to float noise, and a linear backward."""
    module = modeling_module(hf)
    original = getattr(module, "mamba_selective_scan", None)
    if original is not None and not hasattr(original, MARK):
        module.mamba_selective_scan = fast_selective_scan(original)


def use_own_s6(hf: PreTrainedModel) -> None:
    """Undo `use_fast_s6`, for models that are wrapped afterwards: nnsight copies a forward's globals."""
    module = modeling_module(hf)
    original = getattr(getattr(module, "mamba_selective_scan", None), MARK, None)
    if original is not None:
        module.mamba_selective_scan = original


def fast_selective_scan(original: Callable[..., Any]) -> Callable[..., Any]:
    """transformers' ``mamba_selective_scan``, with our recurrence for CPU tensors."""

    def mamba_selective_scan(
        hidden_states: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None = None,
        z: Tensor | None = None,
        delta_bias: Tensor | None = None,
        delta_softplus: bool = False,
        return_last_state: bool = False,
        **kwargs: Any,
    ) -> Any:
        if hidden_states.device.type != "cpu":
            return original(hidden_states, dt, A, B, C, D, z, delta_bias, delta_softplus, return_last_state, **kwargs)
        if delta_bias is not None:
            dt = dt + delta_bias.to(dt.dtype)[..., None]
        if delta_softplus:
            dt = F.softplus(dt)
        y, state = s6.forward(
            hidden_states.transpose(1, 2), dt.transpose(1, 2), A, B.transpose(1, 2), C.transpose(1, 2), D
        )
        y = y.transpose(1, 2)
        if z is not None:
            y = y * F.silu(z)
        y = y.to(hidden_states.dtype)
        return (y, state) if return_last_state else y

    setattr(mamba_selective_scan, MARK, original)
    return mamba_selective_scan
