"""Text to activations: no token lost or doubled, every row the model's own, every row handed out once."""

from __future__ import annotations

import random
from pathlib import Path

import datasets
import jaxtyping
import pytest
import torch

import circuitbench as cb
from circuitbench.activations import ActivationStream, Documents, Rows, Shuffled, mixing, packed
from circuitbench.tracing import capture

SITES = ["layers.0.ssm.gated", "layers.1.ssm.state"]


@pytest.fixture(scope="module")
def model() -> cb.Model:
    return cb.load_model("random:mamba2")


@pytest.fixture(scope="module")
def words() -> cb.Model:
    return cb.load_model("zoo:pylm-mamba2")


def some_ids(n: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(3, 97), k=n)


@pytest.mark.parametrize("context", [2, 7, 64])
@pytest.mark.parametrize("separator", [None, 1])
def test_packing_neither_loses_nor_doubles_a_token(context: int, separator: int | None) -> None:
    documents = [some_ids(n, n) for n in (1, 0, 30, 7, 7, 128, 2, 0)]
    sequences = list(packed(documents, context, separator))
    expected = documents[0].copy()
    for document in documents[1:]:
        if document:
            expected += ([] if separator is None else [separator]) + document
    assert [token for sequence in sequences for token in sequence] == expected
    assert all(len(sequence) == context for sequence in sequences[:-1])
    assert 0 < len(sequences[-1]) <= context


def test_a_separator_that_is_there_is_not_put_twice() -> None:
    assert list(packed([[5, 1], [6], [1, 7]], 10, 1)) == [[5, 1, 6, 1, 7]]


def test_every_row_is_what_capture_reads_for_that_token(model: cb.Model) -> None:
    documents = [some_ids(n, n) for n in (13, 40, 5)]
    stream = ActivationStream(model, SITES, documents, context=16, sequences_per_forward=2)
    sequences = dict(stream.sequences())
    rows = list(stream)
    seen = set()
    for part in rows:
        for index, (number, position) in enumerate(zip(part.sequence.tolist(), part.position.tolist(), strict=True)):
            assert part.token_ids[index] == sequences[number][position]
            seen.add((number, position))
    assert seen == {(number, t) for number, ids in sequences.items() for t in range(len(ids))}
    for number, ids in sequences.items():
        alone = capture(model, torch.tensor([ids]), SITES)
        for address in SITES:
            mine = torch.cat([part[address][part.sequence == number] for part in rows])
            torch.testing.assert_close(mine, alone[address][0].flatten(1), rtol=1e-5, atol=1e-6)


def test_special_tokens_have_no_row_unless_asked_for(words: cb.Model) -> None:
    texts = ["import os", "def f(x):"]
    ends = words.tokenizer.eos_token_id
    plain = torch.cat([rows.token_ids for rows in ActivationStream(words, "layers.0.ssm.gated", texts, context=8)])
    every = torch.cat(
        [rows.token_ids for rows in ActivationStream(words, "layers.0.ssm.gated", texts, context=8, keep_special=True)]
    )
    assert ends in every
    assert torch.equal(plain, every[every != ends])


def test_texts_may_come_from_anywhere(words: cb.Model, tmp_path: Path) -> None:
    texts = ["import os\n", "x = 1\n"]
    files = [tmp_path / f"{number}.py" for number in range(2)]
    for file, text in zip(files, texts, strict=True):
        file.write_text(text)
    expected = list(Documents(words, texts))
    table = datasets.Dataset.from_dict({"body": texts, "n": [1, 2]})
    assert list(Documents(words, files)) == expected
    assert list(Documents(words, table, "body")) == expected
    assert list(Documents(words, table.to_iterable_dataset(), "body")) == expected
    assert list(Documents(words, iter(texts))) == expected
    assert list(Documents(words, [torch.tensor(ids) for ids in expected])) == expected
    assert list(Documents(words, expected)) == expected
    assert list(Documents(words, torch.tensor([expected[0], expected[0]]))) == [expected[0]] * 2
    assert list(Documents(words, files[0])) == expected[:1]
    assert list(Documents(words, texts[0])) == expected[:1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ([{"body": "x"}], "no column 'text'; it has body"),
        ([3.5], "A document is .* not float"),
        (3, "Text is a string, a path, token ids, or an iterable"),
        (Path("nowhere.txt"), "nowhere.txt is not a file"),
        ([[5, 100_000]], "Token id 100000 is not one of the model's"),
        ([], "no tokens"),
        ("", "no tokens"),
    ],
)
def test_what_is_no_text_is_said_in_one_sentence(
    words: cb.Model, text: object, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as for users
    with pytest.raises(cb.BadInput, match=message):
        list(ActivationStream(words, "layers.0.ssm.gated", text, context=8))  # pyright: ignore[reportArgumentType]


def test_an_iterator_is_read_once(words: cb.Model) -> None:
    stream = ActivationStream(words, "layers.0.ssm.gated", iter(["import os"]), context=8)
    list(stream)
    with pytest.raises(cb.BadInput, match="iterator, and has been read"):
        list(stream)


def test_a_site_without_rows_for_tokens_is_refused(model: cb.Model) -> None:
    with pytest.raises(cb.BadInput, match=r"layers.0.ssm.mixing is \(b, h, t, t\)"):
        ActivationStream(model, "layers.0.ssm.mixing", "5 6")


def test_the_model_stops_after_the_last_site(model: cb.Model) -> None:
    calls: list[int] = []
    handle = model.hf.get_submodule("backbone.norm_f").register_forward_hook(lambda *_: calls.append(1))
    list(ActivationStream(model, SITES[0], [some_ids(40)], context=16))
    handle.remove()
    assert not calls


def test_a_shuffle_hands_out_every_row_once_with_its_own_numbers(model: cb.Model) -> None:
    stream = ActivationStream(model, SITES, [some_ids(501)], context=16, sequences_per_forward=4)
    straight = {
        (int(s), int(t)): {address: rows[address][i] for address in SITES}
        for rows in stream
        for i, (s, t) in enumerate(zip(rows.sequence, rows.position, strict=True))
    }
    batches = list(Shuffled(stream, batch_size=32, buffer=128, seed=3))
    seen = []
    for batch in batches:
        for i, (s, t) in enumerate(zip(batch.sequence.tolist(), batch.position.tolist(), strict=True)):
            seen.append((s, t))
            assert all(torch.equal(batch[address][i], straight[s, t][address]) for address in SITES)
    assert sorted(seen) == sorted(straight)
    assert seen != sorted(seen)
    assert [len(batch.token_ids) for batch in batches[:-1]] == [32] * (len(batches) - 1)
    again = list(Shuffled(stream, batch_size=32, buffer=128, seed=3))
    assert all(torch.equal(a.position, b.position) for a, b in zip(batches, again, strict=True))
    other = list(Shuffled(stream, batch_size=32, buffer=128, seed=4))
    assert not torch.equal(batches[0].position, other[0].position)


def test_a_pool_mixes_as_computed() -> None:
    """Rows that enter together meet in a batch with probability p/(2 − p), p = batch/pool; in a full shuffle, b/n."""
    n, length, batch = 32_768, 32, 64
    sequence = torch.arange(n // length).repeat_interleave(length)
    position = torch.arange(n) % length
    parts = [Rows({}, position[i : i + 128], sequence[i : i + 128], position[i : i + 128]) for i in range(0, n, 128)]
    generator = torch.Generator().manual_seed(0)
    full = mixing(list(sequence[torch.randperm(n, generator=generator)].split(batch)))
    assert full == pytest.approx(1.0, abs=0.1)
    assert mixing([sequence[i : i + batch] for i in range(0, n, batch)]) < 0.01
    for pool in (256, 2048):
        found = mixing([rows.sequence for rows in Shuffled(parts, batch_size=batch, buffer=pool)])
        assert found == pytest.approx((2 - batch / pool) * pool / n, rel=0.1)
    whole = mixing([rows.sequence for rows in Shuffled(parts, batch_size=batch, buffer=n)])
    assert whole == pytest.approx(1.0, abs=0.1)
