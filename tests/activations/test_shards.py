"""Activations on disk: the numbers that were stored, by several processes, through kills, or a clear error."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import circuitbench as cb
from circuitbench.activations import ActivationStream, StoredActivations, store
from tests.activations.test_stream import some_ids

SITES = ["layers.0.ssm.x", "layers.0.ssm.gated"]


@pytest.fixture(scope="module")
def model() -> cb.Model:
    return cb.load_model("random:mamba2")


@pytest.fixture
def stream(model: cb.Model) -> ActivationStream:
    return ActivationStream(model, SITES, [some_ids(330)], context=16, sequences_per_forward=4)


def gathered(source: ActivationStream | StoredActivations) -> dict[str, torch.Tensor]:
    """All rows, in the order of the text."""
    parts = list(source)
    place = torch.cat([part.sequence * 1000 + part.position for part in parts])
    order = place.argsort()
    found = {address: torch.cat([part[address] for part in parts])[order] for address in SITES}
    return {**found, "token_ids": torch.cat([part.token_ids for part in parts])[order], "place": place[order]}


@pytest.mark.parametrize("compress", [False, True])
def test_what_is_read_is_what_was_stored(stream: ActivationStream, tmp_path: Path, compress: bool) -> None:
    if compress:
        pytest.importorskip("zstandard")
    stored = store(stream, tmp_path / "store", sequences_per_shard=3, compress=compress)
    expected = gathered(stream)
    for name, value in gathered(StoredActivations(tmp_path / "store")).items():
        assert torch.equal(value, expected[name]), name
    assert stored.finished
    assert "layers.0.ssm.x (64), layers.0.ssm.gated (64)" in repr(stored)
    assert "7 shards of 3 sequences of 16 tokens" in repr(stored)


def test_smaller_numbers_are_off_by_half_a_step_at_most(stream: ActivationStream, tmp_path: Path) -> None:
    expected = gathered(stream)
    sizes = {}
    for dtype, levels in (("float32", None), ("bfloat16", None), ("int8", 127), ("int4", 7)):
        stored = store(stream, tmp_path / dtype, dtype=dtype, sequences_per_shard=100)
        sizes[dtype] = stored.n_bytes
        found = gathered(stored)
        for address in SITES:
            off = (found[address].float() - expected[address]).abs()
            if levels is None:
                assert torch.equal(found[address], expected[address].to(found[address].dtype))
            else:  # one shard, so one scale a channel
                step = expected[address].abs().amax(0) / levels
                assert (off <= step * 0.5001).all()
                assert (off > step * 0.4).any()
    assert sizes["int4"] < sizes["int8"] < sizes["bfloat16"] < sizes["float32"]


def test_two_parts_hold_what_one_holds(stream: ActivationStream, tmp_path: Path) -> None:
    for number in (1, 0):
        stored = store(stream, tmp_path / "two", sequences_per_shard=4, part=(number, 2))
        assert stored.finished == (number == 0)
    expected = gathered(stream)
    for name, value in gathered(stored).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6, msg=name)


def test_writing_goes_on_after_the_last_whole_shard(stream: ActivationStream, tmp_path: Path) -> None:
    whole = store(stream, tmp_path / "whole", sequences_per_shard=2)
    again = tmp_path / "again"
    shutil.copytree(tmp_path / "whole", again)
    part = again / "part-0000-of-0001"
    (part / "finished.json").unlink()
    for number in range(5, 11):
        (part / f"shard-{number:06d}.safetensors").unlink()
    (part / "shard-000005.safetensors.77.unfinished").write_bytes(b"half of it")
    with pytest.raises(cb.BadInput, match="is unfinished: part-0000-of-0001"):
        list(StoredActivations(again))
    store(stream, again, sequences_per_shard=2)
    for mine, theirs in zip(StoredActivations(again).shards(), whole.shards(), strict=True):
        assert mine.read_bytes() == theirs.read_bytes()


def test_damage_is_named(stream: ActivationStream, tmp_path: Path) -> None:
    folder = tmp_path / "store"
    stored = store(stream, folder, sequences_per_shard=5)
    path = stored.shards()[1]
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(cb.BadInput, match="shard-000001.safetensors is damaged"):
        list(stored)
    path.unlink()
    with pytest.raises(cb.BadInput, match="but no shard 1"):
        list(stored)
    path.write_bytes(data)
    stored.shards()[-1].unlink()
    with pytest.raises(cb.BadInput, match="has 4 of its 5 shards"):
        list(stored)
    with pytest.raises(cb.BadInput, match="was begun with dtype = 'float32', now 'int8'"):
        store(stream, folder, dtype="int8", sequences_per_shard=5)
    with pytest.raises(cb.BadInput, match="'int3' is not a way to store activations"):
        store(stream, folder, dtype="int3")
    with pytest.raises(cb.BadInput, match="has no store.json"):
        StoredActivations(tmp_path)


WRITER = """
import sys, torch
torch.set_num_threads(1)
import circuitbench as cb
from circuitbench.activations import ActivationStream, store
from tests.activations.test_stream import some_ids
model = cb.load_model("random:mamba2")
stream = ActivationStream(model, ["layers.0.ssm.x", "layers.0.ssm.gated"], [some_ids(6000)], context=16)
print("ready", flush=True)
store(stream, sys.argv[1], sequences_per_shard=3)
"""


@pytest.mark.slow
def test_a_killed_writer_leaves_nothing_damaged(model: cb.Model, tmp_path: Path) -> None:
    folder = tmp_path / "killed"
    kills = 0
    for attempt in range(60):
        process = subprocess.Popen([sys.executable, "-c", WRITER, str(folder)], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(0.05 + 0.07 * (attempt % 7))
        if process.poll() is None and kills < 20:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.wait()
        if kills == 20 or (folder / "part-0000-of-0001" / "finished.json").exists():
            break
    stream = ActivationStream(model, SITES, [some_ids(6000)], context=16)
    store(stream, folder, sequences_per_shard=3)
    whole = store(stream, tmp_path / "whole", sequences_per_shard=3)
    assert kills >= 5
    for mine, theirs in zip(StoredActivations(folder).shards(), whole.shards(), strict=True):
        assert mine.read_bytes() == theirs.read_bytes()
    assert json.loads((folder / "store.json").read_text()) == whole.record
