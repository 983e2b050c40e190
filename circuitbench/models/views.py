"""What a user touches inside a with-block: ``model.layers[3].ssm.y``.

Plain Python objects over plain envoys. Reading an attribute asks nnsight for the tensor, assigning to it swaps one in.
They travel to remote servers by value, so nothing of ours has to exist there; what they carry is numbers, strings and
functions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..errors import BadInput, ReadOnlySite, SiteNotFound
from .events import worker
from .scan_view import run_of
from .spots import instrument

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from nnsight.intervention.envoy import Envoy
    from torch import Tensor

    from ..architectures.scans import Scan
    from .attention_view import Pattern
    from .scan_view import ScanRun
    from .spots import Spot


def not_found(owner: str, name: str, sites: list[str]) -> SiteNotFound:
    """The error for a site that is not there, naming those that are."""
    return SiteNotFound(f"{owner} has no site {name!r}; it has {', '.join(sites) or 'none'}.")


class PartView:
    """The sites of one component of a layer; ``dir()`` lists them."""

    _address: str
    _spots: dict[str, Spot | Pattern]

    def __init__(self, address: str, spots: dict[str, Spot | Pattern]) -> None:
        self.__dict__["_address"] = address
        self.__dict__["_spots"] = spots

    @property
    def sites(self) -> list[str]:
        """Names of this component's sites, in the order the model reaches them."""
        return list(self._spots)

    def __getattr__(self, name: str) -> Tensor:
        if name.startswith("_"):
            raise AttributeError(name)
        if name not in self._spots:
            raise not_found(self._address, name, self.sites)
        return self._spots[name].get()

    def __setattr__(self, name: str, value: Tensor) -> None:
        if name not in self._spots:
            raise not_found(self._address, name, self.sites)
        self._spots[name].set(value)

    def __dir__(self) -> list[str]:
        return self.sites

    def __repr__(self) -> str:
        return f"<{self._address}: {', '.join(self.sites)}>"


class Verbs:
    """The functions of one recurrence, without the module they live in: a module does not travel."""

    def __init__(self, recurrence: Any) -> None:
        for verb in ("forward", "states", "iter_states", "decay_of", "write_of", "mixing", "knockout"):
            setattr(self, verb, getattr(recurrence, verb))
        if hasattr(recurrence, "scale_of"):  # where states are held in units of their own
            self.scale_of = recurrence.scale_of


class SSMView(PartView):
    """The sites of a state-space (or other recurrent) mixer.

    Beside the sites: `edit_state` changes the recurrent state, `iter_state` reads it in bounded memory.
    """

    _envoy: Envoy
    _scan: Scan
    _recurrence: Any
    _scan_sites: dict[str, str]
    _names: list[str]
    _instrument: list[Envoy]
    _continues: str

    def __init__(
        self,
        address: str,
        spots: dict[str, Spot | Pattern],
        envoy: Envoy,
        scan: Scan,
        recurrence: Any,
        scan_sites: dict[str, str],
        names: list[str],
        instrument: list[Envoy],
        continues: str,
    ) -> None:
        self.__dict__["_address"] = address
        self.__dict__["_spots"] = spots
        self.__dict__["_envoy"] = envoy
        self.__dict__["_scan"] = scan
        self.__dict__["_recurrence"] = recurrence
        self.__dict__["_scan_sites"] = scan_sites
        self.__dict__["_names"] = names
        self.__dict__["_instrument"] = instrument
        self.__dict__["_continues"] = continues

    @property
    def sites(self) -> list[str]:
        """Names of this mixer's sites, in the order the model reaches them."""
        return list(self._names)

    def _run(self, start: Tensor | None = None) -> ScanRun:
        """The block's run of the scan; one that goes on from a state `(b, ...)`, if it is given."""
        worker(self._address)
        instrument(self._instrument, self._address)
        return run_of(self._address, self._envoy, self._scan, self._recurrence, self._continues, start)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        kind = self._scan_sites.get(name)
        if kind is None or (kind == "gate" and name in self._spots and not self._run().firing.gated):
            if name not in self._spots:
                raise not_found(self._address, name, self.sites)
            return self._spots[name].get()
        if kind == "state":
            return self._run().states()
        if kind == "scale":
            return self._run().scale()
        if kind == "y":
            return self._run().take_y()
        if kind == "gate":
            return self._run().take_gate()
        if kind == "mixing":
            return self._run().mixing()
        if kind == "mixing by channel":
            return self._mixing
        return self._run().take(kind)

    def __setattr__(self, name: str, value: Tensor) -> None:
        kind = self._scan_sites.get(name)
        if kind is None or (kind == "gate" and name in self._spots and not self._run().firing.gated):
            if name not in self._spots:
                raise not_found(self._address, name, self.sites)
            self._spots[name].set(value)
        elif kind == "state":
            raise ReadOnlySite(
                f"{self._address}.state cannot be assigned; change it with "
                f"{self._address}.edit_state({{position: tensor or function}})."
            )
        elif kind == "scale":
            raise ReadOnlySite(
                f"{self._address}.scale cannot be assigned: it follows from the gates or keys; write those, or decay."
            )
        elif kind in ("mixing", "mixing by channel"):
            raise ReadOnlySite(
                f"{self._address}.mixing cannot be assigned; remove source -> destination pairs with cb.Knockout, "
                "or write x, B, C or decay."
            )
        elif kind == "y":
            self._run().give_y(value)
        elif kind == "gate":
            self._run().give_gate(value)
        else:
            self._run().give(kind, value)

    def _mixing(self, channels: Any = None) -> Tensor:
        """S6 has one matrix a channel, so the channels have to be named."""
        if channels is None:
            raise BadInput(
                f"{self._address}.mixing has one matrix for every channel; name the channels: mixing(channels=[0, 1])."
            )
        return self._run().mixing(channels)

    def edit_state(
        self,
        edits: dict[int, Tensor | Callable[[Tensor], Tensor]],
        when: str | None = None,
        states: bool = True,
    ) -> Tensor | None:
        """Change the recurrent state at some positions; every later position follows.

        In RWKV-4 and xLSTM the state is in units of exp(``ssm.scale``) at its position: multiply a state from another
        run or position by exp(its scale − the scale here).

        Args:
            edits: Position in this forward (as padded; negative ones count from the end) -> the new h_t, or a function
                from h_t to it.
            when: ``"before_read"``: y_t is read from the changed state. ``"after_read"``: y_t keeps what it read, and
                what the next position (or the cache) receives is changed. Default: before whatever reads h_t, which is
                ``"before_read"`` but for RWKV-4: its y_t reads h_{t-1}, so that there is ``"after_read"`` alone.
            states: Whether to return all states of this forward, edits included.

        Returns:
            The states `(b, t, ...)`, or ``None`` with ``states=False``, which saves computing them.

        Raises:
            BadInput: For a position out of range, or once the model is past this scan.
        """
        run = self._run()
        run.edit(edits, when)
        return run.states() if states else None

    def iter_state(self, chunk: int = 64) -> Iterator[tuple[int, Tensor]]:
        """(first position, states of the next `chunk` positions), so that only one chunk exists at a time."""
        return self._run().iter_states(chunk)

    def knock_out(self, sources: Tensor, destinations: Tensor, heads: Any = None) -> None:
        """Remove what `sources` contribute to y at `destinations` (boolean masks over positions)."""
        self._run().knock_out(sources, destinations, heads)

    def __dir__(self) -> list[str]:
        return [*self.sites, "edit_state", "iter_state", "knock_out"]


class LayerView:
    """One layer: its own sites (``resid_pre``, ``resid_mid``, ``resid_post``) and its parts (``ssm``, ``attn``, …).

    Attributes:
        index: Number of the layer.
        kind: ``"ssm"``, ``"conv"`` (a short convolution and no state), ``"attention"``, ``"hybrid"`` (attention and one
            of them) or ``"mlp"`` (none).
        envoy: nnsight's envoy of the layer's module.
        shapes: Site name -> shape, with sizes where they are known.
        axes: Site name -> axis names.
    """

    index: int
    kind: str
    envoy: Any
    shapes: dict[str, tuple[str, ...]]
    axes: dict[str, list[str]]
    _spots: dict[str, Spot]
    _parts: dict[str, PartView]

    def __init__(
        self,
        index: int,
        kind: str,
        envoy: Envoy,
        spots: dict[str, Spot],
        parts: dict[str, PartView],
        shapes: dict[str, tuple[str, ...]],
        axes: dict[str, list[str]],
    ) -> None:
        self.__dict__.update(
            {
                "index": index,
                "kind": kind,
                "envoy": envoy,
                "_spots": spots,
                "_parts": parts,
                "shapes": shapes,
                "axes": axes,
            }
        )

    @property
    def sites(self) -> list[str]:
        """Names of this layer's sites, in the order the model reaches them."""
        return list(self.shapes)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        if name in self._parts:
            return self._parts[name]
        if name not in self._spots:
            raise not_found(f"layers.{self.index} ({self.kind})", name, self.sites)
        return self._spots[name].get()

    def __setattr__(self, name: str, value: Tensor) -> None:
        if name not in self._spots:
            raise not_found(f"layers.{self.index} ({self.kind})", name, self.sites)
        self._spots[name].set(value)

    def __dir__(self) -> list[str]:
        return [*self._spots, *self._parts, "kind", "sites", "shapes", "index", "envoy"]

    def __repr__(self) -> str:
        return f"<layers.{self.index} ({self.kind}): {', '.join(self.sites)}>"


class Layers:
    """The model's layers, by index."""

    def __init__(self, layers: list[LayerView]) -> None:
        self._layers = layers

    def __getitem__(self, index: int) -> LayerView:
        if not isinstance(index, int) or not -len(self._layers) <= index < len(self._layers):
            raise SiteNotFound(f"There is no layer {index!r}; this model has layers 0 to {len(self._layers) - 1}.")
        return self._layers[index]

    def __len__(self) -> int:
        return len(self._layers)

    def __iter__(self) -> Iterator[LayerView]:
        return iter(self._layers)

    def __repr__(self) -> str:
        return f"<{len(self._layers)} layers>"
