"""The zoo's synthetic models load and answer, and the compiled model's circuit is the circuit it claims."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, Mamba2ForCausalLM, PreTrainedModel

from circuitbench.errors import BadInput
from circuitbench.models import zoo
from circuitbench.models.zoo import compiled, scores, tasks

SYNTHETIC = {
    "mqar-compiled": tasks.mqar,
    "mqar-mamba2": tasks.mqar,
    "mqar-bamba": tasks.mqar,
    "induction-falcon-h1": tasks.induction,
}
CHANCE = 1 / 16


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """These models are so small that a second thread costs more than it brings."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def load(name: str) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(zoo.path(name), dtype=torch.float32).eval()


# --- the shelf ---


def test_an_unknown_name_is_told_the_known_ones() -> None:
    with pytest.raises(BadInput, match="no zoo model 'mqar'.*mqar-compiled"):
        zoo.path("mqar")
    with pytest.raises(BadInput, match="was trained.*mqar-compiled"):
        zoo.truth("mqar-mamba2")


@pytest.mark.parametrize("name", SYNTHETIC)
def test_the_record_states_where_a_model_comes_from(name: str) -> None:
    record = zoo.record(name)
    assert record["name"] == name
    assert record["parameters"] == sum(p.numel() for p in load(name).parameters())
    assert all(record[key] for key in ("data", "recipe", "scores", "licence", "command"))
    assert record["seconds"] >= 0


# --- synthetic tasks ---


@pytest.mark.parametrize("task", [tasks.mqar, tasks.induction])
def test_labels_are_the_next_token_and_a_seed_decides_the_sample(task) -> None:
    ids, labels = task(64, 5)
    scored = labels != scores.IGNORED
    assert scored.any(1).all() and not scored[:, -1].any()
    assert torch.equal(labels[:, :-1][scored[:, :-1]], ids[:, 1:][scored[:, :-1]])
    assert torch.equal(task(64, 5)[0], ids)
    assert not torch.equal(task(64, 6)[0], ids)


def test_in_mqar_every_question_repeats_a_key_and_its_answer_is_that_keys_value() -> None:
    ids, labels = tasks.mqar(32, 0, pairs=5, keys=9, values=7, gap=3)
    for row, label in zip(ids.tolist(), labels.tolist(), strict=True):
        told = dict(zip(row[0:10:2], row[1:10:2], strict=True))
        asked = {key: answer for key, answer in zip(row, label, strict=True) if answer != scores.IGNORED}
        assert len(told) == 5
        assert asked == told
        assert row[10:13] == [0, 0, 0]


def test_in_induction_the_offset_varies_and_tokens_of_a_prompt_differ() -> None:
    ids, labels = tasks.induction(256, 0)
    offsets = {16 - row.index(row[16]) for row in ids.tolist()}
    assert offsets == {12, 13, 14, 15, 16}
    assert all(len(set(row[:16])) == 16 for row in ids.tolist())
    assert (labels != scores.IGNORED).sum(1).eq(11).all()


def test_impossible_tasks_are_refused() -> None:
    with pytest.raises(BadInput, match="pairs <= keys"):
        tasks.mqar(1, 0, pairs=17)
    with pytest.raises(BadInput, match="length <= vocabulary - 1"):
        tasks.induction(1, 0, length=40)


@pytest.mark.parametrize("name", SYNTHETIC)
def test_synthetic_models_answer_98_percent_of_fresh_prompts(name: str) -> None:
    assert scores.accuracy(load(name), *SYNTHETIC[name](128, 2024)) >= 0.98


def test_falcon_h1_finds_the_repetition_at_every_offset() -> None:
    model = load("induction-falcon-h1")
    ids, labels = tasks.induction(128, 7)
    offset = 16 - (ids[:, :16] == ids[:, 16:17]).int().argmax(1)
    for distance in range(12, 17):
        assert scores.accuracy(model, ids[offset == distance], labels[offset == distance]) >= 0.95


def test_words_are_prompts_for_the_synthetic_models() -> None:
    tokenizer = AutoTokenizer.from_pretrained(zoo.path("mqar-bamba"))
    prompt = "k3 v7 k9 v2 k1 v1 k4 v15 k9"
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    assert tokenizer.decode(ids[0]) == prompt
    for name in ("mqar-compiled", "mqar-mamba2", "mqar-bamba"):
        answer = load(name)(input_ids=ids, use_cache=False).logits[0, -1].argmax()
        assert tokenizer.decode(answer) == "v2", name
    padded = tokenizer(["k3 v7 k3", "k3"], padding=True)
    assert padded.attention_mask == [[1, 1, 1], [0, 0, 1]]
    with pytest.raises(Exception, match="WordLevel"):
        tokenizer("k3 v99")


# --- the compiled circuit ---


def logits_of(model: Mamba2ForCausalLM, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def logits_without_head(model: Mamba2ForCausalLM, ids: Tensor, layer: int, head: int) -> Tensor:
    """Zeroes what a head's scan gives to the gate."""
    size = model.config.head_dim
    own = torch.arange(head * size, (head + 1) * size)
    norm = model.backbone.layers[layer].mixer.norm
    handle = norm.register_forward_pre_hook(lambda _, arguments: (arguments[0].index_fill(-1, own, 0), *arguments[1:]))
    try:
        return logits_of(model, ids)
    finally:
        handle.remove()


def share_right(logits: Tensor, labels: Tensor) -> float:
    scored = labels != scores.IGNORED
    return (logits.argmax(-1) == labels)[scored].float().mean().item()


def test_what_ships_is_what_the_code_builds() -> None:
    built, truth = compiled.mqar()
    shipped = load("mqar-compiled")
    assert zoo.truth("mqar-compiled") == truth
    for name, parameter in built.state_dict().items():
        assert torch.equal(parameter, shipped.state_dict()[name]), name


def test_every_answer_goes_through_the_true_head_and_no_other() -> None:
    model, truth = load("mqar-compiled"), zoo.truth("mqar-compiled")
    ids, labels = tasks.mqar(16, 1, pairs=8)
    scored = labels != scores.IGNORED
    clean = logits_of(model, ids)
    for layer in range(model.config.num_hidden_layers):
        for head in range(model.config.num_heads):
            ablated = logits_without_head(model, ids, layer, head)
            moved = (ablated - clean)[scored].abs().max().item()
            if (layer, head) == (truth.layer, truth.head):
                assert share_right(ablated, labels) <= CHANCE
                assert moved > 5
            elif layer == truth.layer:
                assert moved == 0  # nothing reads it
            else:
                assert share_right(ablated, labels) == 1
                assert 0 < moved < 1  # it is felt, through the scale of the norms alone


@pytest.mark.parametrize("part", ["x", "B", "C"])
def test_each_projection_works_at_its_tap_and_at_no_other(part: str) -> None:
    ids, labels = tasks.mqar(16, 2)
    for tap in range(compiled.KERNEL):
        model, truth = compiled.mqar()
        channels, true_tap = slice(*getattr(truth, f"{part}_channels")), getattr(truth, f"{part}_tap")
        weight = model.backbone.layers[truth.layer].mixer.conv1d.weight.data[channels]
        weight.zero_()
        weight[:, 0, tap] = 1
        assert (share_right(logits_of(model, ids), labels) == 1) == (tap == true_tap)


def test_channels_outside_the_truth_do_not_matter() -> None:
    model, truth = compiled.mqar()
    ids, _ = tasks.mqar(16, 3)
    clean = logits_of(model, ids)
    weight = model.backbone.layers[truth.layer].mixer.conv1d.weight.data
    others = torch.ones(len(weight), dtype=torch.bool)
    for channels in (truth.x_channels, truth.B_channels, truth.C_channels):
        others[slice(*channels)] = False
    weight[others] = torch.randn_like(weight[others])
    assert torch.equal(logits_of(model, ids), clean)


def test_the_memory_is_the_true_heads_state_and_its_copy_is_read_by_nobody() -> None:
    model, truth = load("mqar-compiled"), zoo.truth("mqar-compiled")
    keys, values = model.config.state_size, model.config.head_dim
    ids, labels = tasks.mqar(16, 4)
    told, question = ids[:, :8], ids[:, 8:9]
    donor = told.clone()
    donor[:, 1::2] = (told[:, 1::2] - 1 - keys + 5) % values + 1 + keys  # the same keys with other values
    donor_answer = (labels[:, 8] - 1 - keys + 5) % values + 1 + keys

    def run(ids: Tensor, cache=None):
        with torch.no_grad():
            return model(input_ids=ids, cache_params=cache, use_cache=True)

    state = run(told).cache_params.layers[truth.layer].recurrent_states[0]
    pairs = torch.zeros(16, values, keys, dtype=torch.bool)
    pairs[torch.arange(16)[:, None], told[:, 1::2] - 1 - keys, told[:, 0::2] - 1] = True
    assert torch.equal(state[:, truth.head] > 0.1, pairs)
    assert torch.equal(state[:, truth.head].abs() > 1e-4, pairs)
    assert torch.equal(state[:, truth.copy], state[:, truth.head])

    donor_state = run(donor).cache_params.layers[truth.layer].recurrent_states[0]
    for head, answer in ((truth.head, donor_answer), (truth.copy, labels[:, 8])):
        cache = run(told).cache_params
        cache.layers[truth.layer].recurrent_states[0][:, head] = donor_state[:, head]
        assert torch.equal(run(question, cache).logits[:, -1].argmax(-1), answer)


@pytest.mark.parametrize(
    "sizes",
    [
        {"layer": 0, "head": 7, "seed": 3},
        {"keys": 8, "values": 12, "heads": 6, "layers": 3, "layer": 2, "head": 0, "noise": 0.0},
        {"keys": 20, "values": 10, "heads": 10, "layers": 1, "layer": 0, "head": 9},
    ],
)
def test_the_circuit_can_be_put_elsewhere_and_have_other_sizes(sizes: dict) -> None:
    model, truth = compiled.mqar(**sizes)
    keys, values = sizes.get("keys", 16), sizes.get("values", 16)
    ids, labels = tasks.mqar(16, 0, keys=keys, values=values)
    assert (truth.layer, truth.head) == (sizes["layer"], sizes["head"])
    assert share_right(logits_of(model, ids), labels) == 1
    assert share_right(logits_without_head(model, ids, truth.layer, truth.head), labels) <= CHANCE
    assert share_right(logits_without_head(model, ids, truth.layer, truth.copy), labels) == 1


def test_the_seed_decides_the_noise_and_not_the_circuit() -> None:
    (one, truth), (other, truth_too) = compiled.mqar(seed=1), compiled.mqar(seed=2)
    assert truth == truth_too
    assert not torch.equal(one.backbone.layers[0].mixer.out_proj.weight, other.backbone.layers[0].mixer.out_proj.weight)
    assert dataclasses.asdict(truth)["layer"] == 1


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(BadInput, match="head 8 of 8"):
        compiled.mqar(head=8)
    with pytest.raises(BadInput, match="heads >= 7"):
        compiled.mqar(heads=4)
