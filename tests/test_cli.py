"""What the commands print, write and return."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import circuitbench as cb
from circuitbench import cli
from circuitbench.activations import ActivationStream, StoredActivations
from circuitbench.architectures import ARCHITECTURES

IDS = "5 17 3 80 11"


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Exit code, standard output, standard error."""
    code = cli.main(arguments)
    out, err = capsys.readouterr()
    return code, out, err


def test_info_says_what_a_model_is(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "info", "random:jamba", "--json")
    found = json.loads(out)
    model = cb.load_model("random:jamba")
    assert code == 0
    assert found["parameters"] == sum(p.numel() for p in model.hf.parameters())
    assert found["layers"] == ["ssm", "attention", "ssm", "attention"]
    assert found["scans"]["mamba_selective_scan"] == "circuitbench"
    assert set(found["versions"]) == {"torch", "transformers", "nnsight"}
    _, text, _ = run(capsys, "info", "random:jamba", "--dtype", "bfloat16")
    assert f"{found['parameters']:,} in bfloat16" in text
    assert "attention layers.1, 3" in text


def test_store_writes_what_info_describes(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    text, out = tmp_path / "ids.txt", tmp_path / "acts"
    text.write_text(" ".join(str(5 + index % 60) for index in range(100)))
    asked = ["--text", str(text), "--sites", "layers.0.H1", "layers.1.ssm.y", "--context", "16", "--out", str(out)]
    asked = ["store", "random:mamba2", *asked, "--format", "int8"]
    code, said, _ = run(capsys, *asked, "--part", "1/2")
    assert code == 0 and ", unfinished" in said
    assert run(capsys, "info", str(out))[1] == said
    code, said, _ = run(capsys, *asked, "--part", "0/2", "--json")
    found = json.loads(said)
    assert code == 0 and found == json.loads(run(capsys, "info", str(out), "--json")[1])
    assert found["sites"] == {"layers.0.ssm.gated": [64], "layers.1.ssm.y": [4, 16]}
    assert (found["model"], found["dtype"], found["finished"], found["rows"]) == ("mamba2", "int8", True, 100)
    stream = ActivationStream(cb.load_model("random:mamba2"), "layers.1.ssm.y", text, context=16)
    expected = torch.cat(list(stream.site()))
    step = expected.abs().amax(0) / 127
    stored = [rows["layers.1.ssm.y"] for rows in StoredActivations(out)]
    assert len(torch.cat(stored)) == 100 and (torch.cat(stored).amax(0) <= expected.amax(0) + step).all()
    code, _, err = run(capsys, *asked, "--part", "half")
    assert code == 2 and "--part 'half' is not like" in err


def test_info_says_what_a_dictionary_is(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    sae = cb.dictionaries.build("topk", d_in=8, d_dict=24, k=3)
    sae.site, sae.model_name = "layers.1.ssm.gated", "pylm-hybrid"
    sae.save(tmp_path)
    found = json.loads(run(capsys, "info", str(tmp_path), "--json")[1])
    assert found == {
        "kind": "topk",
        "model": "pylm-hybrid",
        "site": "layers.1.ssm.gated",
        "site_out": None,
        "d_in": 8,
        "d_out": 8,
        "d_dict": 24,
        "k": 3,
    }
    assert "site      layers.1.ssm.gated" in run(capsys, "info", str(tmp_path))[1]


def test_sites_lists_what_can_be_read(capsys: pytest.CaptureFixture[str]) -> None:
    model = cb.load_model("random:mamba2")
    _, text, _ = run(capsys, "sites", "random:mamba2")
    assert text == f"{model!r}\n"
    _, out, _ = run(capsys, "sites", "random:mamba2", "--json")
    found = json.loads(out)["sites"]
    assert list(found) == model.sites
    assert found["layers.1.ssm.state"] == ["b", "t", "4", "16", "8"]


def test_check_passes_what_holds(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "check", "random:mamba2", "--sites", "layers.0.ssm.y")
    assert (code, err) == (0, "")
    assert "the scan replayed" in out and out.splitlines()[-1].startswith("all ")


def test_check_fails_what_does_not_hold(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    whole = ARCHITECTURES["mamba2"]
    wrong = replace(whole, sites={**whole.sites, "ssm.gated": cb.Site("in_proj:output", "b t d_inner")})
    monkeypatch.setitem(ARCHITECTURES, "mamba2", wrong)
    code, out, _ = run(capsys, "check", "random:mamba2", "--sites", "layers.*.ssm.gated")
    assert code == 1
    assert "FAIL  layers.0-1 ssm.gated: reads. It has shape (2, 13, 164)" in out
    code, out, _ = run(capsys, "check", "random:mamba2", "random:llama", "--sites", "layers.0.resid_pre", "--json")
    assert code == 0  # of two models, neither fails
    assert [found["model"] for found in json.loads(out)] == ["random:mamba2", "random:llama"]


def test_capture_writes_what_capture_returns(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out, listed = tmp_path / "acts", tmp_path / "prompts.txt"
    listed.write_text("1 2 3\n\n4 5\n")
    arguments = ["--prompt", IDS, "--prompts", str(listed), "--sites", "layers.*.ssm.y", "embed", "--out", str(out)]
    code, text, _ = run(capsys, "capture", "random:mamba2", *arguments, "--batch-size", "2", "--json")
    assert code == 0
    found = json.loads(text)
    assert found["lengths"] == [5, 3, 2]
    assert found["sites"] == ["embed", "layers.0.ssm.y", "layers.1.ssm.y"]
    assert [Path(file).name for file in found["files"]] == ["000000.safetensors", "000001.safetensors"]
    expected = cb.capture(cb.load_model("random:mamba2"), [IDS, "1 2 3", "4 5"], "layers.1.ssm.y")["layers.1.ssm.y"]
    written = [load_file(file)["layers.1.ssm.y"] for file in found["files"]]
    torch.testing.assert_close(written[0], expected[:2], equal_nan=True)
    torch.testing.assert_close(written[1], expected[2:, :2])


def test_capture_keeps_the_positions_that_are_asked_for(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for number, (given, kept) in enumerate({"last": [4], "0,-2": [0, 3]}.items()):
        out = tmp_path / str(number)
        run(
            capsys,
            "capture",
            "random:mamba",
            "--prompt",
            IDS,
            "--sites",
            "embed",
            "--out",
            str(out),
            "--positions",
            given,
        )
        whole = cb.capture(cb.load_model("random:mamba"), IDS, "embed")["embed"]
        torch.testing.assert_close(load_file(out / "000000.safetensors")["embed"], whole[:, kept])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["info", "random:nope"], "random:nope is not a family"),
        (["sites", "zoo:nope"], "no zoo model"),
        (["info", "/no/such/folder"], "Could not load"),
        (["check", "random:mamba2", "--sites", "layers.0.attn.q"], "layer 0 (ssm) has resid_pre"),
        (["check", "random:mamba2", "--dtype", "float3"], "no floating-point type"),
        (["capture", "random:mamba2", "--sites", "embed", "--out", "OUT"], "There are no prompts"),
        (["capture", "random:mamba2", "--prompt", IDS, "--sites", "nope", "--out", "OUT"], "There is no site 'nope'"),
        (["capture", "random:mamba2", "--prompt", IDS, "--sites", "embed", "--out", "FULL"], "is not empty"),
        (
            ["capture", "random:mamba2", "--prompts", "OUT", "--sites", "embed", "--out", "OUT"],
            "cannot be read as text",
        ),
        (
            ["capture", "random:mamba2", "--prompt", IDS, "--sites", "embed", "--out", "OUT", "--positions", "first"],
            "neither",
        ),
    ],
)
def test_what_cannot_be_done_is_one_sentence_and_exit_code_2(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "older.safetensors").touch()
    paths = {"OUT": str(tmp_path / "out"), "FULL": str(tmp_path / "full")}
    code, out, err = run(capsys, *(paths.get(argument, argument) for argument in arguments))
    assert (code, out) == (2, "")
    assert said in err
    assert err.startswith("circuitbench: ") and "Traceback" not in err


def test_unknown_commands_and_options_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["nope"], ["info"], ["capture", "random:mamba2", "--out", "x"]):
        with pytest.raises(SystemExit) as exit:
            cli.main(arguments)
        assert exit.value.code == 2
        assert "usage: circuitbench" in capsys.readouterr().err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        cli.main(["--version"])
    assert exit.value.code == 0
    assert capsys.readouterr().out == f"circuitbench {cb.__version__}\n"


def test_the_command_takes_its_arguments_from_the_shell(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["circuitbench", "sites", "random:gpt2", "--json"])
    assert cli.main() == 0
    assert json.loads(capsys.readouterr().out)["model"] == "random:gpt2"
