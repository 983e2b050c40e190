"""A scan that one function runs, given a recurrence's operands as its arguments: no class to write.

Travels to remote servers by value (see `scans`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..errors import BadInput
from .scans import Call, Scan, bind, cloned

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

BESIDE = ("D", "initial_state")  # arguments that are no operands


class FunctionScan(Scan):
    """A function that takes the operands as the recurrence has them, for any number of tokens, and returns y."""

    def __init__(
        self,
        recurrence: str,
        function: str,
        arguments: Mapping[str, str],
        *,
        returns_state: bool = False,
        write_follows_state: bool = True,
    ) -> None:
        """
        Args:
            recurrence: Name of a recurrence, such as one that was given to `circuitbench.recurrences.register`.
            function: Where the part calls the function, by nnsight's name: ``"/memorise_0"`` (its name, and the number
                of the call).
            arguments: The function's own arguments, in their order -> what each is to the recurrence: an operand, or
                ``"D"``, or ``"initial_state"``.
            returns_state: Whether it returns (y, final state) rather than y.
            write_follows_state: Whether what a step adds depends on the state before it.
        """
        self.recurrence = recurrence
        self.sequence = self.step = function
        self.arguments = dict(arguments)
        self.operand_names = tuple(name for name in self.arguments.values() if name not in BESIDE)
        self.returns_state = returns_state
        self.write_follows_state = write_follows_state

    def read(self, args: tuple, kwargs: dict, decoding: bool) -> Call:
        given = bind(tuple(self.arguments), args, kwargs)
        found = {name: given[own] for own, name in self.arguments.items() if own in given}
        lacking = [own for own, name in self.arguments.items() if name in self.operand_names and own not in given]
        if lacking:
            raise BadInput(
                f"{self.sequence} was called without {', '.join(lacking)}: say in FunctionScan what its arguments are "
                "called, in their order."
            )
        return Call(
            operands={name: found[name] for name in self.operand_names},
            D=found.get("D"),
            dtype=found["x"].dtype,
            initial_state=cloned(found.get("initial_state")),
            returns_state=self.returns_state,
        )

    def pack(self, call: Call, y: Tensor, state: Tensor | None, decoding: bool) -> Any:
        return (y, state) if self.returns_state else y

    def output_y(self, output: Any, decoding: bool) -> Tensor:
        return output[0] if self.returns_state else output
