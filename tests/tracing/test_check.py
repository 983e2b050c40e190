"""`check` passes every map there is, and says where and how a wrong one is wrong."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import circuitbench as cb
from circuitbench import Architecture, CheckFailed, Site, SiteNotFound
from circuitbench.architectures import ARCHITECTURES
from circuitbench.architectures.scans import S6Scan, SSDScan
from circuitbench.models import kernels
from circuitbench.models.random import random_model
from circuitbench.tracing.check import check
from circuitbench.tracing.checks.report import CheckReport
from tests.ndif.plugin import NdifServer, save_for_server

ROOT = Path(__file__).parents[2]
SUM = "the sum of the branches"
BRANCHES = ("attn.out", "resid_pre", "resid_mid", "mlp.out", "resid_post")
SOME = ["layers.0.ssm.state", "layers.0.ssm.y", "layers.0.ssm.gated"]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def reports() -> dict[str, dict[str, Any]]:
    """`circuitbench check` on every family, as from a shell: run-time shape checks take three times as long."""
    names = [f"random:{family}" for family in ARCHITECTURES]
    command = [sys.executable, "-m", "circuitbench", "check", "--json", *names]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr
    return dict(zip(ARCHITECTURES, json.loads(done.stdout), strict=True))


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_every_map_holds(family: str, reports: dict[str, dict[str, Any]]) -> None:
    assert reports[family]["ok"]
    rows = reports[family]["rows"]
    assert all(row["ok"] for row in rows)  # and nothing was left out
    model = cb.load_model(f"random:{family}")
    assert {row["site"] for row in rows if row["check"] == "reads"} == set(model.sites)
    writable = {address for address in model.sites if not address.endswith((".state", ".scale", ".mixing"))}
    for how in ("own value assigned", "own value in place"):
        unchanged = {row["site"]: row["measured"] for row in rows if row["check"] == how}
        assert unchanged == dict.fromkeys(writable, 0.0)


def test_the_page_of_architectures_is_current(reports: dict[str, dict[str, Any]]) -> None:
    """All of it but the size of the differences, and the versions that are installed here."""
    script = runpy.run_path(str(ROOT / "scripts" / "architectures.py"))
    pinned = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    for report in reports.values():
        report["versions"] = {name: pinned[name] for name in report["versions"]}
    here, written = (
        re.sub(r"(?<=\| )(0|\de-\d\d)(?= \|)", "#", text)
        for text in (script["page"](reports), (ROOT / "docs" / "architectures.md").read_text(encoding="utf-8"))
    )
    assert here == written, "docs/architectures.md is stale: run python scripts/architectures.py"


@pytest.mark.parametrize(
    ("family", "settings", "names"),
    [
        ("falcon_h1", {"mamba_rms_norm": False}, ["ssm.y", "ssm.gate", "ssm.gated"]),
        ("granitemoehybrid", {"num_local_experts": 0, "num_experts_per_tok": 0}, ["ssm.out", *BRANCHES[1:]]),
        ("gpt_neox", {"use_parallel_residual": False}, BRANCHES),
        ("zamba2", {"use_shared_attention_adapter": True}, None),
    ],
)
def test_the_maps_hold_for_other_configurations(family: str, settings: dict, names: list[str] | None) -> None:
    model = cb.load_model(random_model(ARCHITECTURES[family], **settings))
    some = [address for address in model.sites if address.startswith("layers.1.attn")]
    report = check(model, sites=some if names is None else [f"layers.0.{name}" for name in names])
    report.raise_if_failed()


@pytest.mark.parametrize("family", ["mamba", "mamba2"])
def test_bfloat16_models_keep_their_bits_too(family: str) -> None:
    model = cb.load_model(f"random:{family}", dtype="bfloat16")
    report = check(model, sites=[a for a in model.sites if a.startswith("layers.1")]).raise_if_failed()
    assert {row.measured for row in report.rows if row.check.startswith("own value ")} == {0.0}


def test_rounding_noise_is_that_of_the_model_in_float64() -> None:
    hf = random_model(ARCHITECTURES["mamba2"])
    noise = check(hf, sites="embed").facts["noise"]
    ids = torch.randint(3, 97, (4, 13))
    with torch.no_grad():
        low = hf(ids).logits
        high = hf.double()(ids).logits
    measured = ((low - high).abs().max() / high.abs().max()).item()
    assert measured / 4 < noise < measured * 4


# A wrong map fails ----------------------------------------------------------------------------------------------------

Change = Callable[[Architecture], Architecture]


def sites(**changed: Site) -> Change:
    """The map with other locations for some sites (``__`` stands for a dot)."""
    return lambda map: replace(map, sites={**map.sites, **{k.replace("__", "."): v for k, v in changed.items()}})


def ssm(**changed: Any) -> Change:
    """The map with something else about its mixer."""
    return lambda map: replace(map, parts={**map.parts, "ssm": replace(map.parts["ssm"], **changed)})


class Swapped(SSDScan):
    def read(self, args: tuple, kwargs: dict, decoding: bool) -> Any:
        call = SSDScan.read(self, args, kwargs, decoding)
        call.operands["B"], call.operands["C"] = call.operands["C"], call.operands["B"]
        return call


class Undiscretised(S6Scan):
    def read(self, args: tuple, kwargs: dict, decoding: bool) -> Any:
        return S6Scan.read(self, args, {**kwargs, "delta_softplus": False}, decoding)


class AnotherRecurrence(SSDScan):
    recurrence = "s6"


class Elsewhere(SSDScan):
    sequence = "/chunk_scan_0"


QKV = "b t (h s p) -> s b t h p"  # GPT-2's is (s h p)
WRONG = {
    "another module's output": (
        "mamba2",
        sites(ssm__gated=Site("in_proj:output", "b t d_inner")),
        ("layers.0.ssm.gated", "reads", r"shape \(2, 13, 164\)"),
    ),
    "a module that is never called": (
        "mamba2",
        sites(ssm__conv=Site("conv1d:output", "b t conv_dim")),
        ("layers.0.ssm.conv", "reads", "Correct its location"),
    ),
    "a module that does not exist": (
        "mamba2",
        sites(ssm__gated=Site("outproj:input", "b t d_inner")),
        ("layers.1.ssm.gated", "the map names what is there", "no module 'outproj'"),
    ),
    "an operation that does not exist": (
        "mamba2",
        sites(ssm__conv=Site("/conv_0:output", "b t conv_dim")),
        ("layers.0.ssm.conv", "the map names what is there", "no operation 'conv_0' .* causal_conv1d_fn_0"),
    ),
    "a scan that does not exist": (
        "mamba2",
        ssm(scan=Elsewhere()),
        ("layers.0.ssm", "the map names what is there", "'chunk_scan_0' .* mamba2_chunk_scan_0"),
    ),
    "a part that does not exist": (
        "bamba",
        ssm(paths=("mixer",)),
        ("layers.0", "the map names what is there", r"no 'ssm' at 'mixer' .* mamba \(BambaMixer\)"),
    ),
    "layers that do not exist": (
        "mamba2",
        lambda map: replace(map, layers="model.layers"),
        ("model", "the map names what is there", "'model.layers'"),
    ),
    "an unembedding that does not exist": (
        "mamba2",
        lambda map: replace(map, unembed="embed_out"),
        ("model", "the map names what is there", "'embed_out'"),
    ),
    "sites in another order than the model's": (
        "mamba2",
        lambda map: replace(map, sites={n: map.sites[n] for n in sorted(map.sites, key=lambda n: n == "ssm.in_proj")}),
        ("layers.0.ssm.in_proj", "reads", "before layers.0.resid_post"),
    ),
    "axes in another order": (
        "mamba2",
        sites(ssm__conv=Site("/causal_conv1d_fn_0:output", "b t conv_dim", trim=False)),
        ("layers.0.ssm.conv", "reads", "layout"),
    ),
    "swapped operands": ("mamba2", ssm(scan=Swapped()), ("layers.1.ssm.y", "the scan replayed", "swapped operands")),
    "another recurrence": (
        "mamba2",
        ssm(scan=AnotherRecurrence()),
        ("layers.0.ssm.y", "the scan replayed", "another recurrence"),
    ),
    "dt before its softplus": (
        "mamba",
        ssm(scan=Undiscretised()),
        ("layers.0.ssm.y", "the scan replayed", "before its softplus"),
    ),
    "another order of channels after the gate": (
        "mamba2",
        sites(ssm__gated=Site("out_proj:input", "b t (h p) -> b t (p h)")),
        ("layers.0.ssm.gated", "its channels are those of y", "another order"),
    ),
    "another order of heads and projections": (
        "gpt2",
        sites(attn__q=Site("c_attn:output", QKV, index=0)),
        ("layers.0.attn.q", "a head reaches its own", "another order"),
    ),
    "keys for queries": (
        "gpt2",
        sites(attn__q=ARCHITECTURES["gpt2"].sites["attn.k"]),
        ("layers.0.attn.q", "a head reaches its own", "another of q, k, v"),
    ),
    "a residual stream read once and added again": (
        "llama",
        sites(resid_mid=Site("post_attention_layernorm:input", base="", in_place=False)),
        ("layers.1.resid_post", f"{SUM}, resid_mid assigned", "in_place=True"),
    ),
    "the same, edited in place": (
        "llama",
        sites(resid_mid=Site("post_attention_layernorm:input", base="", in_place=False)),
        ("layers.0.resid_mid", "in place equals assigned", "in_place=True"),
    ),
    "a branch that reads the residual stream itself": (
        "olmo_hybrid",
        sites(mlp__in=Site(":input")),
        ("layers.1.mlp.in", "in place equals assigned", "copied=True"),
    ),
    "a branch before its norm": (
        "gemma2",
        sites(attn__out=Site(":output")),
        ("layers.0.resid_mid", SUM, "multiplier or a norm"),
    ),
    "a branch without its multiplier": (
        "granitemoehybrid",
        sites(ssm__out=Site(":output")),
        ("layers.0.resid_mid", SUM, "scale="),
    ),
    "logits before their scaling": (
        "granitemoehybrid",
        lambda map: replace(map, logits=Site("lm_head:output", "b t vocab")),
        ("logits", "the model's own", "map's logits"),
    ),
}


# Where the failure concerns few sites, only those are checked: run-time shape checks are slow.
SITES = {
    "another module's output": "layers.*.ssm.gated",
    "a module that is never called": "layers.*.ssm.conv",
    "a module that does not exist": "layers.*.ssm.y",
    "an operation that does not exist": "layers.*.ssm.y",
    "a scan that does not exist": "embed",
    "a part that does not exist": "embed",
    "an unembedding that does not exist": "embed",
    "sites in another order than the model's": ["layers.0.ssm.in_proj", "layers.0.resid_post"],
    "axes in another order": "layers.*.ssm.conv",
    "swapped operands": "layers.*.ssm.y",
    "another recurrence": ["layers.0.ssm.y", "layers.0.ssm.x", "layers.0.ssm.state"],
    "dt before its softplus": "layers.*.ssm.y",
    "another order of channels after the gate": ["layers.0.ssm.y", "layers.0.ssm.gated"],
    "another order of heads and projections": [f"layers.0.attn.{name}" for name in ("q", "k", "v", "pattern", "z")],
    "keys for queries": [f"layers.0.attn.{name}" for name in ("q", "k", "v", "pattern", "z")],
    "a residual stream read once and added again": [f"layers.1.{name}" for name in BRANCHES],
    "the same, edited in place": "layers.*.resid_mid",
    "a branch that reads the residual stream itself": "layers.*.mlp.in",
    "a branch before its norm": [f"layers.0.{name}" for name in BRANCHES],
    "a branch without its multiplier": [f"layers.0.{name}" for name in ("ssm.out", *BRANCHES[1:])],
    "logits before their scaling": "logits",
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_map_fails_where_it_is_wrong(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    family, change, (site, name, advice) = WRONG[case]
    monkeypatch.setitem(ARCHITECTURES, family, change(ARCHITECTURES[family]))
    report = check(f"random:{family}", sites=SITES.get(case))
    assert not report.ok
    with pytest.raises(CheckFailed, match=advice):
        report.raise_if_failed()
    rows = [row for row in report.failed if (row.site, row.check) == (site, name)]
    assert len(rows) == 1, report
    assert site.rpartition(".")[2] in str(report)


def test_a_map_without_a_module_is_checked_for_the_rest() -> None:
    """What is not mapped is not wrong; sums that would need it are left out, and that is said."""
    whole = ARCHITECTURES["bamba"]
    part = replace(
        whole,
        parts={name: part for name, part in whole.parts.items() if name == "ssm"},
        sites={name: site for name, site in whole.sites.items() if name.startswith(("ssm", "resid"))},
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ARCHITECTURES, "bamba", part)
        report = check("random:bamba").raise_if_failed()
    unverified = [row for row in report.rows if row.ok is None]
    assert {row.check for row in unverified} == {SUM}
    assert "feed_forward" in unverified[0].advice


# What it is asked --------------------------------------------------------------------------------------------------


def test_chosen_sites_are_checked_and_no_others() -> None:
    model = cb.load_model("random:bamba")
    report = check(model, sites=["layers.*.ssm.y", "layers.1.attn.out"]).raise_if_failed()
    sites = {row.site for row in report.rows} - {"model", "logits"}
    assert sites == {"layers.0.ssm.y", "layers.2.ssm.y", "layers.1.attn.out"}
    with pytest.raises(SiteNotFound):
        check(model, sites="layers.1.ssm.y")


def test_every_layer_is_edited_when_asked_to_be() -> None:
    model = cb.load_model("random:mamba2")
    edited = {True: set(), False: set()}
    for every in edited:
        report = check(model, sites=["layers.*.ssm.y", "layers.*.resid_post"], every_layer=every)
        edited[every] = {row.site for row in report.rows if row.check == "an edit moves the logits"}
    assert "layers.1.ssm.y" in edited[True] - edited[False]


def test_a_check_leaves_the_model_as_it_was() -> None:
    model = cb.load_model("random:jamba")
    ids = torch.randint(3, 97, (2, 9))
    with torch.no_grad():
        before = model.hf(ids).logits
        check(model, sites="layers.0.ssm.y")
        after = model.hf(ids).logits
    assert torch.equal(before, after)
    assert not model.nn._edits


def test_where_padding_leaks_prompts_are_of_one_length() -> None:
    report = check(random_model(ARCHITECTURES["mamba"], use_bias=True), sites="embed").raise_if_failed()
    assert report.facts["lengths"] == [13, 13]
    assert "padding leaks, and is refused" in [row.check for row in report.rows if row.ok]


def test_a_model_that_transformers_cannot_run_is_said_to_be_so() -> None:
    report = check(random_model(ARCHITECTURES["bamba"], attn_layer_indices=[]))
    assert [row.check for row in report.failed] == ["runs"]
    assert "get_seq_length" in str(report)


def test_traces_may_run_on_a_server_without_the_weights_here(ndif_server: NdifServer, tmp_path: Path) -> None:
    source = save_for_server(random_model(ARCHITECTURES["mamba"], vocab_size=257), tmp_path)
    here, there = check(source, sites=SOME), check(source, sites=SOME, remote=ndif_server.url)
    there.raise_if_failed()
    left_out = {"the model's own", "padding is inert", "the state is the cache's", "an edited state moves the logits"}
    verified = [{row.check for row in report.rows if row.ok} for report in (here, there)]
    assert verified[0] - verified[1] == left_out | {"edit_state equals an edited cache"}
    assert [row.check for row in there.rows if row.ok is None] == ["edit_state equals an edited cache"]


def test_what_a_map_breaks_on_a_server_is_a_finding_and_a_lost_server_an_error(
    ndif_server: NdifServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = save_for_server(random_model(ARCHITECTURES["mamba2"], vocab_size=257), tmp_path)
    wrong = sites(ssm__conv=Site("conv1d:output", "b t conv_dim"))(ARCHITECTURES["mamba2"])
    monkeypatch.setitem(ARCHITECTURES, "mamba2", wrong)
    failed = check(source, sites="layers.0.ssm.conv", remote=ndif_server.url).failed
    assert [(row.site, row.check) for row in failed] == [("layers.0.ssm.conv", "reads")]
    assert "already ran past it" in failed[0].advice
    with pytest.raises(cb.RemoteError, match="cannot be reached"):
        check(source, remote="http://127.0.0.1:9")


def test_traces_may_be_shipped_and_run_here() -> None:
    check("random:mamba2", sites=SOME[-1:], remote="local").raise_if_failed()


def test_a_report_is_plain_data_and_a_short_table() -> None:
    report = check("random:bamba")
    assert isinstance(report, CheckReport)
    found = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert found["ok"] is True and len(found["rows"]) == len(report.rows)
    table = str(report)
    assert "layers.0, 2: ssm" in table and "layers.1, 3: attention" in table
    assert len(table.splitlines()) < 90
    assert max(len(line) for line in table.splitlines()) <= 120
    assert repr(report) == table


# Kernels ----------------------------------------------------------------------------------------------------------

FAKE_KERNELS = """
import sys, warnings
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(1)
import circuitbench as cb
from circuitbench.tracing.check import check
from circuitbench.architectures import ARCHITECTURES
from circuitbench.models import kernels
from circuitbench.models.random import random_model
try:
    cb.load_model("random:mamba2")
except cb.KernelMismatch as error:
    print("refused:", error)
report = check("random:mamba2", sites="layers.0.ssm.y")
print(report)
assert not report.ok
hf = random_model(ARCHITECTURES["mamba2"])
kernels.use_torch_kernels(hf)
print(check(hf, sites="layers.0.ssm.y").raise_if_failed().ok)
"""


def test_kernels_that_cannot_run_here_are_named_and_the_torch_path_works(tmp_path: Path) -> None:
    package = tmp_path / "mamba_ssm" / "ops" / "triton"
    package.mkdir(parents=True)
    crash = "def {0}(*args, **kwargs):\n    raise RuntimeError('0 active drivers')\n"
    (tmp_path / "mamba_ssm" / "__init__.py").write_text("")
    (tmp_path / "mamba_ssm" / "ops" / "__init__.py").write_text("")
    (package / "__init__.py").write_text("")
    names = ("mamba_chunk_scan_combined", "mamba_split_conv1d_scan_combined")
    (package / "ssd_combined.py").write_text("".join(crash.format(name) for name in names))
    (package / "selective_state_update.py").write_text(crash.format("selective_state_update"))
    done = subprocess.run([sys.executable, "-c", FAKE_KERNELS, tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "refused: mamba_ssm is installed" in done.stdout
    assert "FAIL  model: installed kernels fit the device. mamba_ssm is installed" in done.stdout
    assert "use_torch_kernels(hf_model)" in done.stdout
    assert "1 of " in done.stdout  # everything else holds, on the torch path
    assert done.stdout.endswith("True\n")


def test_our_s6_scan_is_compared_with_transformers_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU ours runs in its place, so that the model's own output would be ours too."""
    model = cb.load_model("random:mamba")
    module = kernels.modeling_module(model.hf)
    original = getattr(module.mamba_selective_scan, kernels.MARK)
    monkeypatch.setattr(
        module.mamba_selective_scan, kernels.MARK, lambda *args, **kwargs: 1.001 * original(*args, **kwargs)
    )
    failed = check(model, sites="layers.0.ssm.y").failed
    assert ("layers.0.ssm.y", "the scan replayed") in {(row.site, row.check) for row in failed}
