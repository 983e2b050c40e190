"""Activations on disk: the numbers that were stored, by several processes, through kills, or a clear error."""

from __future__ import annotations

import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import datasets
import pytest
import torch
from filelock import FileLock

import circuitbench as cb
from circuitbench.activations import ActivationStream, Shuffled, StoredActivations, store
from circuitbench.activations.numbers import decoded, encoded
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
    assert "activations of mamba2 in" in repr(stored)
    assert "layers.0.ssm.x (4, 16), layers.0.ssm.gated (64)" in repr(stored)
    assert "330 rows of 330 tokens" in repr(stored)
    assert "7 shards of 3 sequences of 16 tokens" in repr(stored)
    assert stored.counts() == stream.counts() == (21, 330, 330)


@pytest.mark.parametrize(("dtype", "levels"), [("int8", 127), ("int4", 7)])
def test_integers_are_off_by_half_a_step_at_most_and_by_its_variance_on_average(dtype: str, levels: int) -> None:
    generator = torch.Generator().manual_seed(0)
    largest = torch.tensor([1e-3, 0.7, 30.0])
    x = (2 * torch.rand(60_001, 3, generator=generator) - 1) * largest
    x[0] = largest  # so that a step is the largest value / levels, exactly
    x[1:4, 1] = torch.tensor([0.5, -1.5, 2.5]) * 0.7 / levels  # in the middle between two numbers: off by half a step
    off = decoded(encoded(x, dtype), dtype, 3) - x
    step = largest / levels
    assert (off.abs() <= step / 2 * (1 + 1e-5)).all()
    torch.testing.assert_close(off[1:4, 1].abs(), (step / 2)[1].expand(3), rtol=1e-4, atol=0)
    torch.testing.assert_close(off.pow(2).mean(0), step**2 / 12, rtol=0.02, atol=0)  # of a uniform error
    assert (off[0].abs() < 1e-6 * largest).all()
    nothing = encoded(torch.zeros(5, 3), dtype)
    assert (decoded(nothing, dtype, 3) == 0).all()
    with pytest.raises(cb.BadInput, match=f"layers.0.ssm.y holds values that are not finite, which {dtype}"):
        encoded(torch.tensor([[1.0, torch.inf]]), dtype, "layers.0.ssm.y")


def test_a_store_is_what_its_type_makes_of_each_shard(stream: ActivationStream, tmp_path: Path) -> None:
    expected = list(ActivationStream(stream.model, SITES, [some_ids(330)], context=16, sequences_per_forward=5))
    sizes = {}
    for dtype in ("float32", "bfloat16", "int8", "int4"):
        stored = store(stream, tmp_path / dtype, dtype=dtype, sequences_per_shard=5)
        sizes[dtype] = stored.n_bytes
        for found, rows in zip(stored, expected, strict=True):
            for address in SITES:
                made = decoded(encoded(rows[address], dtype), dtype, 64)
                torch.testing.assert_close(found[address], made, rtol=1e-5, atol=1e-6)
    assert sizes["int4"] < sizes["int8"] < sizes["bfloat16"] < sizes["float32"]


def test_two_parts_of_a_data_set_hold_what_one_holds(model: cb.Model, tmp_path: Path) -> None:
    table = datasets.Dataset.from_dict({"ids": [some_ids(n, n) for n in (150, 3, 170)]})
    stream = ActivationStream(
        model, SITES, table.to_iterable_dataset(), column="ids", context=16, sequences_per_forward=4
    )
    for number in (1, 0):
        stored = store(stream, tmp_path / "two", sequences_per_shard=4, part=(number, 2))
        assert stored.finished == (number == 0)
    expected = gathered(stream)
    assert stored.counts() == stream.counts()
    for name, value in gathered(stored).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6, msg=name)


def test_several_readers_use_one_store(stream: ActivationStream, tmp_path: Path) -> None:
    stored = store(stream, tmp_path / "store", sequences_per_shard=3, dtype="int8")
    expected = gathered(stored)
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(gathered, [stored, StoredActivations(tmp_path / "store"), stored, stored]):
            assert all(torch.equal(found[name], value) for name, value in expected.items())
    one = torch.cat(list(stored.site("layers.0.ssm.x")))
    assert torch.equal(one, torch.cat([rows["layers.0.ssm.x"] for rows in stored]))
    batches = list(Shuffled(stored, batch_size=32, buffer=128, seed=1))
    places = torch.cat([rows.sequence * 1000 + rows.position for rows in batches])
    order = places.argsort()
    assert torch.equal(places[order], expected["place"]) and not torch.equal(places, places[order])
    assert torch.equal(torch.cat([rows["layers.0.ssm.x"] for rows in batches])[order], expected["layers.0.ssm.x"])


def test_another_text_or_model_is_refused(stream: ActivationStream, tmp_path: Path) -> None:
    folder = tmp_path / "store"
    store(stream, folder, sequences_per_shard=5)
    settings = {"context": 16, "sequences_per_forward": 4}
    for text, message in (
        ([some_ids(330, 1)], "shard-000000.safetensors holds another text"),
        ([some_ids(160)], "holds 5 shards, and this text has 2"),
        ([some_ids(330) + [5] * 80], "shard-000004.safetensors holds another text"),
    ):
        with pytest.raises(cb.BadInput, match=message):
            store(ActivationStream(stream.model, SITES, text, **settings), folder, sequences_per_shard=5)
    other = cb.load_model("random:mamba2")
    other.hf.get_input_embeddings().weight.data += 1
    with pytest.raises(cb.BadInput, match="was begun with weights ="):
        store(ActivationStream(other, SITES, [some_ids(330)], **settings), folder, sequences_per_shard=5)
    whole = ActivationStream(stream.model, SITES, [some_ids(160)], **settings)
    store(whole, tmp_path / "whole", sequences_per_shard=5)
    with pytest.raises(cb.BadInput, match="was finished with less text"):
        store(stream, tmp_path / "whole", sequences_per_shard=5)


def test_a_part_has_one_writer(stream: ActivationStream, tmp_path: Path) -> None:
    store(stream, tmp_path / "store", part=(1, 2))
    with FileLock(tmp_path / "store" / "part-0000-of-0002" / "part.lock"):
        pass
    with FileLock(tmp_path / "store" / "part-0001-of-0002" / "part.lock"):
        with pytest.raises(cb.BadInput, match="is being written by another process"):
            store(stream, tmp_path / "store", part=(1, 2))


def test_writing_goes_on_after_the_last_whole_shard(stream: ActivationStream, tmp_path: Path) -> None:
    whole = store(stream, tmp_path / "whole", sequences_per_shard=2)
    again = tmp_path / "again"
    shutil.copytree(tmp_path / "whole", again)
    part = again / "part-0000-of-0001"
    (part / "finished.json").unlink()
    for number in range(5, 11):
        (part / f"shard-{number:06d}.safetensors").unlink()
    (part / "shard-000005.safetensors.77.unfinished").write_bytes(b"half of it")
    assert StoredActivations(again).counts() == (10, 160, 160)
    with pytest.raises(cb.BadInput, match="is unfinished: part-0000-of-0001"):
        list(StoredActivations(again))
    store(stream, again, sequences_per_shard=2)
    for mine, theirs in zip(StoredActivations(again).shards(), whole.shards(), strict=True):
        assert mine.read_bytes() == theirs.read_bytes()
    assert not list(part.glob("*.unfinished"))


@pytest.mark.parametrize("compress", [False, True])
def test_a_truncated_shard_is_named(stream: ActivationStream, tmp_path: Path, compress: bool) -> None:
    if compress:
        pytest.importorskip("zstandard")
    stored = store(stream, tmp_path, sequences_per_shard=10, compress=compress)
    path = stored.shards()[1]
    data = path.read_bytes()
    for length in (0, 5, 200, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:length])
        with pytest.raises(cb.BadInput, match=r"shard-000001.safetensors(.zst)? is damaged"):
            list(stored)
    path.write_bytes(data)
    list(stored)


def test_damage_is_named(stream: ActivationStream, tmp_path: Path) -> None:
    folder = tmp_path / "store"
    stored = store(stream, folder, sequences_per_shard=5)
    path = stored.shards()[1]
    data = path.read_bytes()
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


# The writers are forks of one process that has loaded the model; each is killed at a random moment.
KILLER = """
import os, random, signal, sys, time, torch
torch.set_num_threads(1)
import circuitbench as cb
from circuitbench.activations import ActivationStream, store
from tests.activations.test_stream import some_ids
model = cb.load_model("random:mamba2")
stream = ActivationStream(model, ["layers.0.ssm.x", "layers.0.ssm.gated"], [some_ids(6000)], context=16)
stream.widths()
write = lambda folder: store(stream, folder, sequences_per_shard=3, dtype=sys.argv[2])
started = time.perf_counter()
write(sys.argv[1] + "/whole")
seconds = time.perf_counter() - started
kills = 0
for seed in range(20):
    writer = os.fork()
    if writer == 0:
        write(sys.argv[1] + "/killed")
        os._exit(0)
    time.sleep(random.Random(seed).uniform(0.02, 0.25) * seconds)
    os.kill(writer, signal.SIGKILL)
    kills += os.waitstatus_to_exitcode(os.waitpid(writer, 0)[1]) == -signal.SIGKILL
    print(kills, len(os.listdir(sys.argv[1] + "/killed/part-0000-of-0001")), flush=True)
write(sys.argv[1] + "/killed")
"""


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "int4"])
def test_a_writer_killed_twenty_times_leaves_what_an_unbroken_one_does(tmp_path: Path, dtype: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", KILLER, str(tmp_path), dtype], capture_output=True, text=True, check=True
    )
    kills, files = zip(*(map(int, line.split()) for line in done.stdout.splitlines()), strict=True)
    assert kills[-1] >= 10 and len(set(files)) >= 5  # while there was something to write, and at different places
    whole, killed = (StoredActivations(tmp_path / name) for name in ("whole", "killed"))
    assert whole.record == killed.record and whole.counts() == killed.counts() == (375, 6000, 6000)
    for mine, theirs in zip(killed.shards(), whole.shards(), strict=True):
        assert mine.read_bytes() == theirs.read_bytes()
    assert not list(tmp_path.rglob("*.unfinished"))
