"""Bits per byte of n-gram models on the text the language models of the zoo are scored on.

    python scripts/ngram_baseline.py

Interpolated Kneser-Ney (Kneser and Ney 1995; Chen and Goodman 1999) over the tokens of `zoo:pylm-hybrid`, trained on
the documents those were trained on. Unlike them, it sees across the ends of documents.
"""

from __future__ import annotations

import argparse
import platform
from typing import NamedTuple

import numpy as np
from transformers import AutoTokenizer

from circuitbench.models import zoo
from circuitbench.models.zoo import corpus, scores


class Counts(NamedTuple):
    """How often each n-gram (packed into an integer) was seen."""

    keys: np.ndarray
    counts: np.ndarray

    def of(self, grams: np.ndarray) -> np.ndarray:
        at = np.minimum(np.searchsorted(self.keys, grams), len(self.keys) - 1)
        return np.where(self.keys[at] == grams, self.counts[at], 0)


def pack(ids: np.ndarray, n: int, bits: int) -> np.ndarray:
    """Returns the n-gram that ends at each position from n - 1 on."""
    packed = np.zeros(len(ids) - n + 1, np.int64)
    for i in range(n):
        packed = (packed << bits) | ids[i : len(ids) - n + 1 + i]
    return packed


def kneser_ney(train: np.ndarray, held_out: np.ndarray, vocabulary: int, order: int) -> float:
    """Returns the bits that a model of this order needs for `held_out[1:]`."""
    bits = (vocabulary - 1).bit_length()
    if bits * order > 62:
        raise SystemExit(f"{order} tokens of {bits} bits do not fit into 63 bits: ask for a lower order.")
    seen = {n: Counts(*np.unique(pack(train, n, bits), return_counts=True)) for n in range(1, order + 1)}
    probability = np.full(len(held_out) - 1, 1 / vocabulary)
    for n in range(1, order + 1):
        grams = seen[n]
        if n < order:  # lower orders count different words before an n-gram, not the n-gram itself
            grams = Counts(*np.unique(seen[n + 1].keys & ((1 << bits * n) - 1), return_counts=True))
        once, twice = (grams.counts == 1).sum(), (grams.counts == 2).sum()
        discount = once / (once + 2 * twice)
        contexts, group = np.unique(grams.keys >> bits, return_inverse=True)
        total = Counts(contexts, np.bincount(group, grams.counts))
        followers = Counts(contexts, np.bincount(group))

        known = max(n - 2, 0)  # the first tokens have no context of this length and keep the lower order
        asked = pack(held_out, n, bits) if n > 1 else held_out[1:]
        count, of_context = grams.of(asked), total.of(asked >> bits)
        lower = probability[known:]
        mixed = (np.maximum(count - discount, 0) + discount * followers.of(asked >> bits) * lower) / np.maximum(
            of_context, 1
        )
        probability[known:] = np.where(of_context > 0, mixed, lower)
    return -np.log2(probability).sum()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--orders", type=int, nargs="+", default=[1, 2, 3, 5])
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(zoo.path("pylm-hybrid"))
    train, held_out = ([document.text for document in part] for part in corpus.split())
    size = sum(len(text.encode()) for text in held_out)
    train_ids, held_out_ids = scores.join(tokenizer, train).numpy(), scores.join(tokenizer, held_out).numpy()
    print(f"Python {platform.python_version()}: {len(train_ids):,} tokens to train on, {size:,} bytes held out")
    for order in arguments.orders:
        print(f"{order}-gram: {kneser_ney(train_ids, held_out_ids, len(tokenizer), order) / size:.4f} bits per byte")


if __name__ == "__main__":
    main()
