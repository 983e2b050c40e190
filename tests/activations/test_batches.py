"""Training batches: every row once a pass, held or streamed, in an order that depends on the seed alone."""

from __future__ import annotations

from collections import Counter
from itertools import islice

import pytest
import torch

import circuitbench as cb
from circuitbench.activations import ActivationStream, RowBatches, Rows, StoredActivations, source_of, store
from tests.activations.test_stream import some_ids

SITES = ["layers.0.ssm.gated", "layers.1.ssm.y"]
N = 501
KIB = 1 / 2**20  # in GiB


@pytest.fixture(scope="module")
def model() -> cb.Model:
    return cb.load_model("random:mamba2")


@pytest.fixture(scope="module")
def stored(model: cb.Model, tmp_path_factory: pytest.TempPathFactory) -> StoredActivations:
    return store(streamed(model), tmp_path_factory.mktemp("acts") / "store", sequences_per_shard=4)


def streamed(model: cb.Model, text: object = None) -> ActivationStream:
    return ActivationStream(model, SITES, text or [some_ids(N)], context=32, sequences_per_forward=4)


def rows_of(batches: list[Rows]) -> list[tuple[int, int]]:
    return [(s, t) for rows in batches for s, t in zip(rows.sequence.tolist(), rows.position.tolist(), strict=True)]


@pytest.mark.parametrize("memory", [2.0, 64 * KIB], ids=["held", "streamed"])
@pytest.mark.parametrize("kind", ["text", "store"])
def test_every_pass_has_every_row_once_and_goes_on_from_any_step(
    model: cb.Model, stored: StoredActivations, memory: float, kind: str
) -> None:
    def batches(seed: int = 5) -> RowBatches:
        source = streamed(model) if kind == "text" else stored
        return RowBatches(source, batch_size=40, seed=seed, memory_gib=memory)

    mine = batches()
    assert (mine.held is None) == (memory < 1)
    first = list(islice(mine.from_step(0), 26))  # 1040 rows: two passes, and the beginning of a third
    assert all(rows.n == 40 for rows in first)
    order = rows_of(first)
    for number in (0, 1):
        passed = order[number * N : (number + 1) * N]
        assert set(Counter(passed).values()) == {1} and len(set(passed)) == N
        assert passed != sorted(passed)
    assert order[:N] != order[N : 2 * N]
    # Each row is the one the stream has for that token.
    straight = {key: (part, i) for part in streamed(model) for i, key in enumerate(rows_of([part]))}
    for rows in first[::7]:
        for index, key in enumerate(rows_of([rows])):
            part, place = straight[key]
            assert rows.token_ids[index] == part.token_ids[place]
            assert all(torch.equal(rows[address][index], part[address][place]) for address in SITES)
    for step in (1, 14):  # 14: after the first pass
        again = list(islice(batches().from_step(step), 2))
        twice = list(islice(mine.from_step(step), 2))
        for rows, other, expected in zip(again, twice, first[step : step + 2], strict=True):
            assert rows_of([rows]) == rows_of([other]) == rows_of([expected])
            assert all(torch.equal(rows[address], expected[address]) for address in SITES)
    assert batches().fingerprint == mine.fingerprint
    assert rows_of(list(islice(batches(6), 1))) != order[:40]


def test_the_sample_is_of_the_data_and_no_row_of_it_is_lost(model: cb.Model) -> None:
    batches = RowBatches(streamed(model), batch_size=40, memory_gib=64 * KIB)
    sample = batches.sample()
    assert sample.n == N  # the pool is smaller than the text, but the text is smaller than a sample
    assert len(set(rows_of(list(islice(batches, 12))))) == 480


def test_a_text_that_is_an_iterator_can_be_held_and_streamed_once(model: cb.Model) -> None:
    held = RowBatches(streamed(model, iter([some_ids(N)])), batch_size=100)
    assert len(list(islice(held, 20))) == 20
    passing = iter(RowBatches(streamed(model, iter([some_ids(N)])), batch_size=40, memory_gib=64 * KIB))
    assert len(list(islice(passing, 12))) == 12
    with pytest.raises(cb.BadInput, match="is an iterator, and has been read"):
        next(passing)


def test_a_source_is_what_was_given_if_it_has_the_sites(model: cb.Model, stored: StoredActivations) -> None:
    stream = streamed(model)
    one = source_of(model, "layers.1.H3", stream)
    assert one.sites == SITES[1:] and one.widths() == {SITES[1]: 64} and one.shapes() == {SITES[1]: (4, 16)}
    (left,) = [rows for rows in source_of(model, SITES[1], stored).of(SITES[1]) if 0 in rows.sequence][:1]
    assert list(left) == SITES[1:]
    with pytest.raises(cb.BadInput, match=r"layers.0.ssm.y: not one of the sites here; there are: layers.0.ssm.gated"):
        source_of(model, "layers.0.ssm.y", stream)
    with pytest.raises(cb.BadInput, match="context: the store that was given has its own"):
        source_of(model, SITES, stored, context=8, column=None)
    other = cb.load_model("random:mamba2")
    with pytest.raises(cb.BadInput, match="The stream is of another model"):
        source_of(other, SITES, stream)
    other.hf.get_input_embeddings().weight.data += 1
    with pytest.raises(cb.BadInput, match="configuration or weights that this mamba2 does not have"):
        source_of(other, SITES, stored)
    with pytest.raises(cb.BadInput, match=r"batch_size=40, memory_gib=1e-06; .* .rows of 512 bytes"):
        RowBatches(stream, batch_size=40, memory_gib=1e-6)
