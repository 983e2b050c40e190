"""An evaluation as files and other tools take it; `dictionaries.evaluation` defines the numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from circuitbench.dictionaries.splicing import recovered

if TYPE_CHECKING:
    from circuitbench.dictionaries.evaluation import Reconstruction
    from circuitbench.dictionaries.splicing import Splice


def to_dict(reconstruction: Reconstruction, splice: Splice) -> dict[str, Any]:
    """Every number by its name, as JSON takes it: for files and model cards. What is not defined is None."""
    edges, counts = reconstruction.histogram()
    numbers: dict[str, Any] = {
        name: value
        for name, value in vars(reconstruction).items()
        if isinstance(value, int | float) and name != "n_rows"
    }
    numbers |= {
        "explained_variance": reconstruction.explained_variance,
        "denser_than_1_percent": reconstruction.denser_than(0.01),
        "denser_than_10_percent": reconstruction.denser_than(0.1),
        "ce_clean": splice.ce_clean,
        "ce_spliced": splice.ce_spliced,
        "kl": splice.kl,
    }
    found = {name: value if value == value and abs(value) != float("inf") else None for name, value in numbers.items()}
    found |= {
        "fvu_by_site": dict(reconstruction.fvu_by_site),
        "ce_ablated": dict(splice.ce_ablated),
        "kl_ablated": dict(splice.kl_ablated),
        "ce_recovered": {
            name: recovered(splice.ce_clean, splice.ce_spliced, loss) if loss > splice.ce_clean else None
            for name, loss in splice.ce_ablated.items()
        },
        "density_histogram": {"log10_edges": edges, "features": counts},
        "n_rows": reconstruction.n_rows,
        "n_tokens": splice.n_tokens,
    }
    return found


def to_saebench(reconstruction: Reconstruction, splice: Splice) -> dict[str, dict[str, float | int]]:
    """The core measures under SAEBench's names and in its groups; ablation is by zeros, as there.

    Two are computed otherwise there (as of May 2026): its `mse` is the squared distance of a row divided by the number
    of tokens in a batch, its `explained_variance` subtracts the squares of mean squares where this one subtracts the
    squares of means.

    Raises:
        BadInput: the zero ablation was not measured, or does not make the model worse.
    """
    r, density = reconstruction, reconstruction.density
    ce_score, all_density = splice.recovered("zero"), density.double().sum().item()

    def mass_above(share: float) -> float:
        return density[density > share].double().sum().item() / all_density if all_density else 0.0

    ablated = splice.kl_ablated["zero"]
    return {
        "model_behavior_preservation": {
            "kl_div_score": (ablated - splice.kl) / ablated,
            "kl_div_with_ablation": ablated,
            "kl_div_with_sae": splice.kl,
        },
        "model_performance_preservation": {
            "ce_loss_score": ce_score,
            "ce_loss_with_ablation": splice.ce_ablated["zero"],
            "ce_loss_with_sae": splice.ce_spliced,
            "ce_loss_without_sae": splice.ce_clean,
        },
        "reconstruction_quality": {
            "explained_variance": r.explained_variance,
            "explained_variance_legacy": r.explained_variance_legacy,
            "mse": r.mse,
            "cossim": r.cosine,
        },
        "shrinkage": {
            "l2_norm_in": r.l2_in,
            "l2_norm_out": r.l2_out,
            "l2_ratio": r.l2_ratio,
            "relative_reconstruction_bias": r.relative_bias,
        },
        "sparsity": {"l0": r.l0, "l1": r.l1},
        "token_stats": {
            "total_tokens_eval_reconstruction": splice.n_tokens,
            "total_tokens_eval_sparsity_variance": r.n_rows,
        },
        "misc_metrics": {
            "freq_over_1_percent": r.denser_than(0.01),
            "freq_over_10_percent": r.denser_than(0.1),
            "normalized_freq_over_1_percent": mass_above(0.01),
            "normalized_freq_over_10_percent": mass_above(0.1),
            "average_max_encoder_cosine_sim": r.max_encoder_cosine,
            "average_max_decoder_cosine_sim": r.max_decoder_cosine,
            "frac_alive": 1 - r.dead_share,
        },
    }
