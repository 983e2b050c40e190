"""The World tokenizer: the longest match, from left to right."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from transformers import AutoTokenizer

import circuitbench as cb
from circuitbench.architectures import ARCHITECTURES
from circuitbench.errors import BadInput
from circuitbench.models.random import random_model
from circuitbench.models.rwkv7 import RwkvTokenizer

WORDS = ["he", "hell", "hello", "lo", " wor", "\n\n", "é", "日", b"\xe6\x97", b"\xff\xfe", "  ", "ab", "abcd"]
FILE = "rwkv_vocab_v20230424.txt"


def write_vocabulary(path: Path) -> dict[bytes, int]:
    words = [bytes([byte]) for byte in range(256)] + [w.encode() if isinstance(w, str) else w for w in WORDS]
    lines = []
    for index, word in enumerate(words, 1):
        try:
            literal = repr(word.decode())
        except UnicodeDecodeError:
            literal = repr(word)
        lines.append(f"{index} {literal} {len(word)}")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return {word: index for index, word in enumerate(words, 1)}


def longest_first(vocabulary: dict[bytes, int], data: bytes) -> list[int]:
    """Another way to the same: try the whole rest, then one byte less, and so on."""
    if not data:
        return []
    end = next(end for end in range(len(data), 0, -1) if data[:end] in vocabulary)
    return [vocabulary[data[:end]], *longest_first(vocabulary, data[end:])]


def test_tokens_are_the_longest_there_are_and_give_the_text_back(tmp_path: Path) -> None:
    vocabulary = write_vocabulary(tmp_path / FILE)
    tokenizer = RwkvTokenizer(tmp_path / FILE)
    generator = random.Random(0)
    pieces = ["hello", " world", "\n", "é", "日本", "abc", "abcd", "  ", "\t", "\x00", "😀", "<"]
    for _ in range(50):
        text = "".join(generator.choices(pieces, k=8))
        ids = tokenizer(text)["input_ids"]
        assert ids == longest_first(vocabulary, text.encode())
        assert tokenizer.decode(ids) == text
    assert tokenizer.decode([vocabulary[b"\xff\xfe"], vocabulary[b"a"]]) == "\ufffd\ufffda"


def test_token_zero_ends_a_text_and_pads(tmp_path: Path) -> None:
    write_vocabulary(tmp_path / FILE)
    tokenizer = RwkvTokenizer(tmp_path / FILE)
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == 0
    assert tokenizer("hello<|rwkv_tokenizer_end_of_text|>")["input_ids"][-1] == 0
    batch = tokenizer(["hello", "hello hello"], padding=True, padding_side="left")
    assert batch["input_ids"][0][0] == 0 and batch["attention_mask"][0][0] == 0
    assert tokenizer.decode([0, *tokenizer("hello")["input_ids"]], skip_special_tokens=True) == "hello"


def test_a_published_folder_needs_no_code_of_its_own(tmp_path: Path) -> None:
    write_vocabulary(tmp_path / "vocabulary.txt")
    hf = random_model(ARCHITECTURES["rwkv7"], vocab_size=300)
    hf.save_pretrained(tmp_path)
    RwkvTokenizer(tmp_path / "vocabulary.txt").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config["auto_map"] = {"AutoTokenizer": ["hf_rwkv_tokenizer.RwkvTokenizer", None]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert isinstance(AutoTokenizer.from_pretrained(tmp_path), RwkvTokenizer)
    expected = cb.load_model(tmp_path).generate_text("hello world", max_new_tokens=4)
    model = cb.load_model(hf, tokenizer=str(tmp_path / "vocabulary.txt"))
    assert model.generate_text("hello world", max_new_tokens=4) == expected


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("300 'abc' 4", "Line 270 of .* is no line of an RWKV vocabulary"),
        ("nonsense", "Line 270 of"),
        ("300 __import__('os') 2", "Line 270 of"),
    ],
)
def test_a_line_of_another_form_is_refused(tmp_path: Path, line: str, sentence: str) -> None:
    write_vocabulary(tmp_path / FILE)
    with open(tmp_path / FILE, "a", encoding="utf-8") as file:
        file.write(line)
    with pytest.raises(BadInput, match=sentence):
        RwkvTokenizer(tmp_path / FILE)


def test_a_file_that_is_no_vocabulary_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="There is no vocabulary"):
        RwkvTokenizer(tmp_path / "nowhere.txt")
    (tmp_path / FILE).write_text("1 'a' 1\n")
    with pytest.raises(BadInput, match="has no token for byte 0"):
        RwkvTokenizer(tmp_path / FILE)
