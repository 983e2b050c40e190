"""What a check found: rows, and the table people read."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from ...errors import CheckFailed

# Checks that every site has: the columns of the table. What else is known of a site stands on a line below it.
COLUMNS = {
    "reads": "reads",
    "own value assigned": "= same",
    "own value in place": "[:] same",
    "an edit moves the logits": "edit moves",
    "an edit stays in its prompt and later": "causal",
    "in place equals assigned": "[:] is =",
}


@dataclass(frozen=True)
class Row:
    """One thing that was verified, or could not be.

    Attributes:
        site: Address of the site, or ``"model"``.
        check: What was verified.
        ok: Whether it holds; ``None`` where it could not be verified here.
        measured: The number, if it is one (differences are relative to the largest entry).
        bound: What `measured` may be at most; where something is to move, what it has to exceed.
        advice: What to do if it failed; why not, if it was not verified; else empty.
    """

    site: str
    check: str
    ok: bool | None
    measured: float | None = None
    bound: float | None = None
    advice: str = ""


@dataclass
class CheckReport:
    """The outcome of `circuitbench.check`. Printing it shows a table, one block for all layers that are alike.

    Attributes:
        model: Name and class of the model.
        rows: Everything that was verified.
        groups: Layers that are alike.
        shapes: Address -> shape, as the map says.
        facts: Versions, the prompts' lengths, the model's own rounding noise, and the time it took.
    """

    model: str
    rows: list[Row] = field(default_factory=list)
    groups: list[list[int]] = field(default_factory=list)
    shapes: dict[str, tuple[str, ...]] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether nothing failed."""
        return not self.failed

    @property
    def failed(self) -> list[Row]:
        """The rows that failed."""
        return [row for row in self.rows if row.ok is False]

    def raise_if_failed(self) -> CheckReport:
        """This report, if nothing failed.

        Raises:
            CheckFailed: Naming the sites, what does not hold, and what to do.
        """
        if self.failed:
            raise CheckFailed(f"{self.model}: {summary(self)}\n" + "\n".join(self.failures()))
        return self

    def to_dict(self) -> dict[str, Any]:
        """Everything, in plain types."""
        rows = [asdict(row) for row in self.rows]
        for row in rows:
            if row["measured"] is not None and not math.isfinite(row["measured"]):
                row["measured"] = str(row["measured"])  # JSON has no word for it
        return {"model": self.model, "ok": self.ok, **self.facts, "rows": rows}

    def failures(self) -> list[str]:
        """One line for each thing that failed, layers that fail alike together."""
        return [f"FAIL  {line}" for line in self.together(False)]

    def together(self, ok: bool | None) -> list[str]:
        """Rows of one outcome, those that differ by their layer alone on one line."""
        found: dict[tuple[str, str, str], list[Row]] = {}
        for row in self.rows:
            if row.ok is ok:
                layer, name = split(row.site)
                advice = row.advice.replace(f"layers.{layer}", "layers.i")
                found.setdefault((name, row.check, advice), []).append(row)
        return [
            f"{where(rows)}: {check}{number(rows[0])}" + (f". {rows[0].advice}" if rows[0].advice else "")
            for (_, check, _), rows in found.items()
        ]

    def __str__(self) -> str:
        facts = self.facts
        lines = [
            f"{self.model} ({facts['class']}, {facts['parameters']:,} parameters, {facts['dtype']}, {facts['device']})"
        ]
        lines.append(f"  {', '.join(f'{name} {version}' for name, version in facts['versions'].items())}")
        if facts["lengths"]:
            lines.append(
                f"  prompts of {' and '.join(map(str, facts['lengths']))} tokens; rounding alone moves the logits by "
                f"{facts['noise']:.0e} of the largest"
            )
        lines += self.block("model", ["model", "embed", "logits"], [""])
        for group in self.groups:
            names = [split(address)[1] for address in self.shapes if split(address)[0] == group[0]]
            kind = facts["kinds"][group[0]]
            lines += self.block(f"{where_layers(group)}: {kind}", names, [f"layers.{index}." for index in group])
        lines += ["", *(f"not verified: {line}" for line in self.together(None)), *self.failures()]
        lines.append(f"{summary(self)}, in {facts['seconds']:.1f} s")
        return "\n".join(lines)

    __repr__ = __str__

    def block(self, title: str, names: list[str], prefixes: list[str]) -> Iterator[str]:
        """The table of one group of layers."""
        found: dict[tuple[str, str], list[Row]] = {}
        for row in self.rows:
            for prefix in prefixes:
                name = row.site.removeprefix(prefix)
                if row.site == prefix + name and name in names and row.ok is not None:
                    found.setdefault((name, row.check), []).append(row)
        if not found:
            return
        yield ""
        yield title
        yield f"{'':<18}{'shape':<24}" + "".join(f"{short:<12}" for short in COLUMNS.values()).rstrip()
        for name in names:
            cells = [cell(found.get((name, check), [])) for check in COLUMNS]
            shape = f"({', '.join(self.shapes[prefixes[0] + name])})" if prefixes[0] + name in self.shapes else ""
            if any(cells):
                yield f"  {name:<16}{shape:<24}" + "".join(f"{text:<12}" for text in cells).rstrip()
            others = {check: rows for (site, check), rows in found.items() if site == name and check not in COLUMNS}
            for check, rows in others.items():
                yield f"  {name:<16}{check}  {cell(rows)}"


def split(site: str) -> tuple[int, str]:
    """Layer (-1: none) and the name inside it."""
    if not site.startswith("layers."):
        return -1, site
    _, layer, *name = site.split(".", 2)
    return int(layer), ".".join(name)


def where(rows: list[Row]) -> str:
    """The sites of rows that differ by their layer alone."""
    layers = [split(row.site)[0] for row in rows]
    if len(layers) == 1:
        return rows[0].site
    return f"{where_layers(layers)} {split(rows[0].site)[1]}".rstrip()


def where_layers(layers: list[int]) -> str:
    """Layers by number, runs of them shortened."""
    runs: list[list[int]] = []
    for layer in sorted(set(layers)):
        if runs and runs[-1][-1] == layer - 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return "layers." + ", ".join(f"{run[0]}" if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def number(row: Row) -> str:
    """What was measured and what is allowed, for one line."""
    if row.measured is None or row.bound is None:
        return ""
    what = "wanted: more than" if "moves" in row.check else "allowed:"
    return f" ({row.measured:.1e}; {what} {row.bound:.1e})"


def cell(rows: list[Row]) -> str:
    """The worst of some rows, in a few characters."""
    if not rows:
        return ""
    if any(row.ok is False for row in rows):
        return "FAIL"
    numbers = [row.measured for row in rows if row.measured is not None]
    if not numbers:
        return "ok"
    worst = min(numbers) if "moves" in rows[0].check else max(numbers)
    return f"{worst:.0e}" if worst else "0"


def summary(report: CheckReport) -> str:
    """How many checks there were, and how many failed."""
    made = [row for row in report.rows if row.ok is not None]
    if report.ok:
        return f"all {len(made)} checks hold"
    return f"{len(report.failed)} of {len(made)} checks failed"
