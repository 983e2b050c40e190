"""Write docs/architectures.md: every family, every site, and what a live check of a tiny random model measured.

    python scripts/architectures.py            # writes the page
    python scripts/architectures.py --print    # to the terminal

The words come from the maps in `circuitbench/architectures/`, the numbers from `circuitbench check`, run here and now.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import circuitbench.architectures as maps
from circuitbench.architectures import ARCHITECTURES, Architecture
from circuitbench.models.binding import canonical_axes

PAGE = Path(__file__).parent.parent / "docs" / "architectures.md"

# Columns of the first table: what is in a cell is the largest difference, relative, over all sites or layers.
MEASURED = {
    "own value": ("own value assigned", "own value in place"),
    "scan replayed": ("the scan replayed", "the scan replayed, gated"),
    "mixing·x": ("mixing times x is y",),
    "edited state": ("edit_state equals an edited cache",),
    "branches": ("the sum of the branches", "the sum of the branches, resid_mid assigned"),
    "padding": ("padding is inert",),
}
COMMON = ["in_proj", "conv", "x", "dt", "B", "C", "decay", "write", "state", "mixing", "y", "gate", "gated", "out"]
INTRODUCTION = """
{families} families have maps. `python scripts/architectures.py` wrote this page, from the maps and from a live
`circuitbench check random:<family>` of each: {made:,} checks hold, with {names}. `circuitbench check MODEL` does the
same on yours; [architecture.md](architecture.md) says how to add a family. Mamba-3 is not among them: this transformers
has no such model, and mamba-ssm (2.3.2) has the layer but no language model of it, nor code that runs without its
kernels.
"""
MEASUREMENTS = """
The largest difference over all sites of a tiny random model in float32, relative to the largest number: a site's own
value written back (how far the logits move), the recurrence replayed against the model's own output, the mixing matrix
times x against y, an edited state against an edited cache, the sum of the branches against the residual stream, a
padded prompt against the same one alone. A dash: there is no such thing in this family.
"""
TABLE = """
✎ reads and writes, • reads. Every family has `embed`, `logits`, `resid_pre` and `resid_post`; what its recurrence has
beyond the common names stands in the last column.
"""
AXES = """
Axes: b prompts, t positions, h heads, p channels of a head, n size of the state, g groups of heads that share B and C,
k and v widths of keys and values, kv heads of keys and values. Sites with • are read only: the state is changed with
`edit_state`, the mixing matrix with `Knockout`.
"""
RECURRENCES = {
    "s6": "S6",
    "ssd": "SSD",
    "gated_delta": "gated delta",
    "kda": "KDA",
    "rwkv7": "RWKV-7",
    "rg_lru": "RG-LRU",
    "wkv4": "WKV (RWKV-4)",
    "mlstm": "mLSTM",
}


def live_reports() -> dict[str, dict[str, Any]]:
    """`circuitbench check` of a tiny random model of every family."""
    names = [f"random:{family}" for family in ARCHITECTURES]
    command = [sys.executable, "-m", "circuitbench", "check", "--json", *names]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if not done.stdout.startswith("["):
        raise SystemExit(done.stderr)
    return dict(zip(ARCHITECTURES, json.loads(done.stdout), strict=True))


def page(reports: dict[str, dict[str, Any]]) -> str:
    """The whole page."""
    versions = next(iter(reports.values()))["versions"]
    made = sum(1 for report in reports.values() for row in report["rows"] if row["ok"])
    names = ", ".join(f"{name} {version.partition('+')[0]}" for name, version in versions.items())
    lines = [
        "# Architectures",
        "",
        *paragraph(INTRODUCTION.format(families=len(reports), made=made, names=names)),
        "",
        "## What was measured",
        "",
        *paragraph(MEASUREMENTS),
        "",
        f"| family | layers | recurrence | checks | {' | '.join(MEASURED)} |",
        f"|---|---|---|---|{'---|' * len(MEASURED)}",
    ]
    lines += [row(ARCHITECTURES[family], report) for family, report in reports.items()]
    lines += ["", "## Families and sites", "", *site_table(list(reports)), "", "## Family by family", ""]
    lines += [*paragraph(AXES), ""]
    for module, families in by_file().items():
        lines += [f"### {', '.join(f'`{family.model_type}`' for family in families)}", "", *description(module), ""]
        seen: list[list[str]] = []
        for family in families:
            sites = list(layouts(family))
            if sites not in seen:
                lines += [*([f"`{family.model_type}`:", ""] if seen else []), *sites, ""]
            seen.append(sites)
            lines += unverified(reports[family.model_type])
    return "\n".join(lines).rstrip() + "\n"


def paragraph(text: str) -> list[str]:
    """Lines of a paragraph."""
    return textwrap.wrap(" ".join(text.split()), 128)


def row(architecture: Architecture, report: dict[str, Any]) -> str:
    """A family's line of measurements."""
    scans = [part.scan for part in architecture.parts.values() if part.scan is not None]
    names = ", ".join(RECURRENCES.get(scan.recurrence, scan.recurrence) for scan in scans) or "–"
    kinds = ", ".join(dict.fromkeys(report["kinds"]))
    held = sum(1 for one in report["rows"] if one["ok"])
    cells = [worst(report, checks) for checks in MEASURED.values()]
    return f"| {architecture.model_type} | {kinds} | {names} | {held} | {' | '.join(cells)} |"


def worst(report: dict[str, Any], checks: tuple[str, ...]) -> str:
    """The largest number of some checks."""
    found = [one["measured"] for one in report["rows"] if one["check"] in checks and one["measured"] is not None]
    return (f"{max(found):.0e}" if max(found) else "0") if found else "–"


def site_table(families: list[str]) -> Iterator[str]:
    """Which family has which sites."""
    yield from paragraph(TABLE)
    yield ""
    yield f"| family | {' | '.join(f'ssm.{name}' for name in COMMON)} | attn | mlp | moe | resid_mid | further |"
    yield f"|---|{'---|' * (len(COMMON) + 5)}"
    for family in families:
        sites = ARCHITECTURES[family].sites
        cells = [mark(sites.get(f"ssm.{name}")) for name in COMMON]
        for part in ("attn", "mlp", "moe"):
            cells.append("✎" if any(name.startswith(f"{part}.") for name in sites) else "")
        cells.append(mark(sites.get("resid_mid")))
        others = [
            name
            for name in sites
            if name.removeprefix("ssm.") not in COMMON and not name.startswith(("resid_", "attn.", "mlp.", "moe."))
        ]
        yield f"| {family} | {' | '.join(cells)} | {' '.join(others)} |"


def mark(entry: Any) -> str:
    """Whether a site is there, and can be written."""
    if entry is None:
        return ""
    one = entry[0] if isinstance(entry, tuple) else entry
    return "✎" if one.writable else "•"


def layouts(architecture: Architecture) -> Iterator[str]:
    """The sites of each part with their axes."""
    parts: dict[str, list[str]] = {}
    for name, entry in architecture.sites.items():
        part, _, site_name = name.rpartition(".")
        one = entry[0] if isinstance(entry, tuple) else entry
        mark = "" if one.writable else "•"
        parts.setdefault(part, []).append(f"{site_name}{mark} ({' '.join(canonical_axes(one))})")
    for part, sites in parts.items():
        if part:
            yield f"- `{part}`: {', '.join(sites)}"


def by_file() -> dict[Any, list[Architecture]]:
    """The maps, file by file."""
    files = [module for name, module in inspect.getmembers(maps, inspect.ismodule) if name != "registry"]
    found: dict[Any, list[Architecture]] = {}
    for architecture in ARCHITECTURES.values():
        home = next(file for file in files if any(value is architecture for value in vars(file).values()))
        found.setdefault(home, []).append(architecture)
    return found


def description(module: Any) -> list[str]:
    """A file's docstring."""
    return (inspect.getdoc(module) or "").replace("``", "`").splitlines()


def unverified(report: dict[str, Any]) -> list[str]:
    """What a check could not verify, and why."""
    left = {one["check"]: one["advice"] for one in report["rows"] if one["ok"] is None}
    return [f"Not verified: {check}. {why}\n" for check, why in left.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--print", action="store_true", help="print the page instead of writing it")
    text = page(live_reports())
    if parser.parse_args().print:
        print(text)
    else:
        PAGE.write_text(text)


if __name__ == "__main__":
    main()
