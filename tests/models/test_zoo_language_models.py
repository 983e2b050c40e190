"""The zoo's language models, the text they were trained on, and the scores stated for them.

They were trained on the text of Python 3.11.7. Another version changes some of it, so bounds on scores leave room.
"""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from circuitbench.models import zoo
from circuitbench.models.zoo import corpus, scores

LANGUAGE = ["pylm-hybrid", "pylm-mamba2"]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """A second thread costs models of this size more than it brings."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def load(name: str) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(zoo.path(name), dtype=torch.float32).eval()


def test_the_zoo_has_its_six_models_and_they_fit_into_nine_megabytes() -> None:
    assert set(zoo.names()) == {"mqar-compiled", "mqar-mamba2", "mqar-bamba", "induction-falcon-h1", *LANGUAGE}
    files = [file for name in zoo.names() for file in zoo.path(name).rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 9e6
    assert {file.suffix for file in files} == {".json", ".safetensors"}


@pytest.mark.parametrize("name", LANGUAGE)
def test_the_record_states_where_a_language_model_comes_from(name: str) -> None:
    record = zoo.record(name)
    assert record["parameters"] == sum(p.numel() for p in load(name).parameters())
    assert record["seconds"] > 0 and "PSF-2.0" in record["licence"]
    assert record["data"]["seen_tokens"] == record["recipe"]["steps"] * 4096


HELD_OUT = ["getopt.py", "html/__init__.py", "types.py", "unittest/result.py", "topics/comparisons"]


@pytest.fixture(scope="module")
def documents() -> list[corpus.Document]:
    return list(corpus.documents())


@pytest.fixture(scope="module")
def held_out_texts(documents) -> list[str]:
    """Held-out text of the running Python."""
    return [document.text for document in documents if document.name in HELD_OUT]


def test_the_text_is_the_same_every_time_and_names_alone_split_it(documents) -> None:
    train, held_out = corpus.split()
    assert sorted([*train, *held_out]) == sorted(documents)
    assert {d.text for d in train}.isdisjoint(d.text for d in held_out)
    assert {d.name for d in held_out} >= set(HELD_OUT)
    assert all(corpus.is_held_out(d.name) for d in held_out) and not any(corpus.is_held_out(d.name) for d in train)
    assert 5e6 < sum(len(d.text) for d in train) < 20e6
    assert 0.02 < len(held_out) / len(train) < 0.10


@pytest.mark.parametrize("name", LANGUAGE)
def test_any_text_survives_the_tokenizer(name: str, held_out_texts) -> None:
    tokenizer = AutoTokenizer.from_pretrained(zoo.path(name))
    for text in [*held_out_texts, " déjà vu\t\n\n  x  ,  y !", "𝛼β🐍\r\n", "don't , stop ."]:
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    padded = tokenizer(["def f(x):", "x"], padding=True)
    assert padded.attention_mask[1][0] == 0 and padded.input_ids[1][0] == tokenizer.pad_token_id


@pytest.mark.parametrize("name", LANGUAGE)
def test_language_models_predict_held_out_text_far_better_than_any_unigram_model(name: str, held_out_texts) -> None:
    tokenizer = AutoTokenizer.from_pretrained(zoo.path(name))
    measured = scores.bits_per_byte(load(name), tokenizer, held_out_texts)
    ids = scores.join(tokenizer, held_out_texts)[1:]
    share = torch.bincount(ids).double() / len(ids)
    entropy = -(share * share.clamp(min=1e-12).log2()).sum().item()  # no unigram model needs fewer bits a token
    size = sum(len(text.encode()) for text in held_out_texts)
    assert measured < 0.65 * entropy * len(ids) / size
    # these five documents are harder than the average of the 43, and another Python's text differs
    assert measured < 1.2 * zoo.record(name)["scores"]["held_out_bits_per_byte"]


def test_the_stated_scores_meet_their_bars() -> None:
    for name, bar in (("pylm-hybrid", 1.20), ("pylm-mamba2", 1.40)):
        record = zoo.record(name)
        assert record["scores"]["held_out_bits_per_byte"] <= bar
        assert record["data"]["python"] == "3.11.7"


@pytest.mark.parametrize("name", LANGUAGE)
def test_the_stated_induction_score_is_found_again(name: str) -> None:
    model = load(name)
    stated = zoo.record(name)["scores"]["induction_tokens_uniform"]
    found = scores.induction_score(model, torch.arange(1, model.config.vocab_size), samples=64, seed=1)
    assert found.gain == pytest.approx(found.first - found.second)
    assert found.gain == pytest.approx(stated["gain"], abs=0.4)
    assert found.first == pytest.approx(stated["first"], abs=0.4)


def test_bits_per_byte_is_the_models_own_loss_over_the_text_in_bits() -> None:
    model = load("pylm-mamba2")
    tokenizer = AutoTokenizer.from_pretrained(zoo.path("pylm-mamba2"))
    texts = ["import os\n", "def naïve(x):\n    return x\n" * 20]
    end = [tokenizer.eos_token_id]
    ids = end + tokenizer(texts[0]).input_ids + end + tokenizer(texts[1]).input_ids + end
    nats = 0.0
    for start in range(0, len(ids) - 1, 50):
        window = torch.tensor([ids[start : start + 51]])
        with torch.no_grad():
            log_probabilities = model(input_ids=window[:, :-1]).logits.log_softmax(-1)
        nats -= log_probabilities[0].gather(1, window[0, 1:, None]).sum().item()
    size = len("".join(texts).encode())
    expected = nats / size / torch.tensor(2.0).log().item()
    assert scores.bits_per_byte(model, tokenizer, texts, context=50, batch=3) == pytest.approx(expected, rel=1e-4)


def test_generation_from_a_string_runs_and_ends_in_python() -> None:
    model, tokenizer = load("pylm-hybrid"), AutoTokenizer.from_pretrained(zoo.path("pylm-hybrid"))
    prompt = tokenizer("for i in range(len(", return_tensors="pt")
    text = tokenizer.decode(model.generate(**prompt, max_new_tokens=12, do_sample=False)[0])
    assert text.startswith("for i in range(len(") and ")" in text[19:]
