"""The result of measuring effects over layers and positions."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import BadInput

if TYPE_CHECKING:
    import pandas as pd
    from jaxtyping import Float
    from torch import Tensor


class Effect(NamedTuple):
    """One cell of an `EffectMap`."""

    layer: int
    position: int
    token: str
    value: float


@dataclass
class EffectMap:
    """Effects on a metric, in the metric's unit.

    Attributes:
        values: `(layers, positions)`; NaN in the rows of layers that lack the site.
        tokens: The prompt's tokens, one for each column.
        site: What was changed.
        metric: What was measured, in words.
        base: The metric of the unchanged run.
        donor: The metric of the run that the values came from, where there is one: `donor - base` is what changing
            everything would do.
    """

    values: Float[Tensor, "layers positions"]
    tokens: list[str]
    site: str
    metric: str
    base: float
    donor: float | None = field(default=None)

    @property
    def layers(self) -> list[int]:
        """Layer of each row."""
        return list(range(len(self.values)))

    def top(self, n: int = 10) -> list[Effect]:
        """The `n` largest effects in absolute value, largest first."""
        if n < 1:
            raise BadInput(f"n={n}; ask for at least 1.")
        measured = [cell for cell in self._cells() if cell.value == cell.value]
        return sorted(measured, key=lambda cell: -abs(cell.value))[:n]

    def to_dataframe(self) -> pd.DataFrame:
        """One row for every layer that has the site and every position: layer, position, token, value."""
        import pandas as pd

        return pd.DataFrame([cell for cell in self._cells() if cell.value == cell.value], columns=list(Effect._fields))

    def plot(self, ax: Any = None) -> Any:
        """Draw the map with matplotlib; returns the axes (`ax`, or new ones).

        Raises:
            BadInput: If matplotlib is not installed.
        """
        try:
            from matplotlib import pyplot
        except ImportError as error:
            raise BadInput("plot() needs matplotlib: pip install 'circuitbench-interp[demo]'.") from error
        if ax is None:
            size = (2 + 0.35 * len(self.tokens), 1.5 + 0.4 * len(self.layers))
            _, ax = pyplot.subplots(figsize=size, layout="constrained")
        largest = max((abs(cell.value) for cell in self.top(1)), default=0.0) or 1.0
        image = ax.imshow(self.values.numpy(), cmap="RdBu", vmin=-largest, vmax=largest, aspect="auto")
        ax.set_xticks(range(len(self.tokens)), [repr(token)[1:-1] for token in self.tokens], rotation=90)
        ax.set_yticks(self.layers, self.layers)
        ax.set(xlabel="token", ylabel="layer", title=self.site)
        ax.figure.colorbar(image, ax=ax, label=f"effect on {self.metric}")
        return ax

    def _cells(self) -> list[Effect]:
        """All cells, layer by layer."""
        return [
            Effect(layer, position, token, value)
            for layer, row in zip(self.layers, self.values.tolist(), strict=True)
            for position, (token, value) in enumerate(zip(self.tokens, row, strict=True))
        ]
