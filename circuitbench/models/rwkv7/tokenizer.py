"""The tokenizer of the "World" models: from left to right the longest string of bytes in the vocabulary.

The vocabulary (``rwkv_vocab_v20230424.txt``) lies beside every such checkpoint on the Hub, with code of its own that
transformers would run; this reads the file without that. It is not shipped here.
"""

from __future__ import annotations

import ast
import os
import shutil
from collections import defaultdict
from typing import Any

from transformers import PreTrainedTokenizer

from ...errors import BadInput

END = "<|rwkv_tokenizer_end_of_text|>"  # token 0, which the file does not list
BYTES = "latin-1"  # how a token's bytes are written as a string: one character each


class RwkvTokenizer(PreTrainedTokenizer):
    """Named as the published folders name theirs, so that transformers finds this one.

    Args:
        vocab_file: Lines of an id, a Python string or bytes literal, and its length in bytes.
        bos_token, eos_token, unk_token, pad_token: Token 0, which ends a text.
        **kwargs: As for any tokenizer of transformers.

    Raises:
        BadInput: For a file of another form.
    """

    vocab_files_names = {"vocab_file": "rwkv_vocab_v20230424.txt"}
    model_input_names = ["input_ids", "attention_mask"]

    def __init__(
        self,
        vocab_file: str | os.PathLike[str],
        bos_token: Any = END,
        eos_token: Any = END,
        unk_token: Any = END,
        pad_token: Any = END,
        **kwargs: Any,
    ) -> None:
        self.vocab_file = os.fspath(vocab_file)
        self.ids = {**read_vocabulary(self.vocab_file), END.encode(BYTES): 0}
        self.tokens = {index: token.decode(BYTES) for token, index in self.ids.items()}
        lengths: defaultdict[bytes, set[int]] = defaultdict(set)
        for token in self.ids:
            lengths[token[:2]].add(len(token))
        self.lengths = {start: sorted(found, reverse=True) for start, found in lengths.items()}
        super().__init__(bos_token=bos_token, eos_token=eos_token, unk_token=unk_token, pad_token=pad_token, **kwargs)

    @property
    def vocab_size(self) -> int:
        """How many ids there are, tokens that were added later apart."""
        return max(self.tokens) + 1

    def get_vocab(self) -> dict[str, int]:
        """Token, one character a byte, -> id."""
        return {token: index for index, token in self.tokens.items()} | self.added_tokens_encoder

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        found, data, start = [], text.encode("utf-8"), 0
        while start < len(data):
            longest = self.lengths.get(data[start : start + 2], ())
            token = next(
                (data[start : start + size] for size in longest if data[start : start + size] in self.ids),
                data[start : start + 1],
            )
            found.append(token.decode(BYTES))
            start += len(token)
        return found

    def _convert_token_to_id(self, token: str) -> int:
        return self.ids.get(token.encode(BYTES, errors="replace"), 0)

    def _convert_id_to_token(self, index: int) -> str:
        return self.tokens.get(index, END)

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Tokens as text; bytes that are no UTF-8 become replacement characters."""
        added = self.added_tokens_encoder
        parts = [token.encode("utf-8" if token in added else BYTES) for token in tokens]
        return b"".join(parts).decode("utf-8", errors="replace")

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str, ...]:
        """Copy the file."""
        name = (f"{filename_prefix}-" if filename_prefix else "") + self.vocab_files_names["vocab_file"]
        path = os.path.join(save_directory, name)
        if os.path.abspath(path) != os.path.abspath(self.vocab_file):
            shutil.copyfile(self.vocab_file, path)
        return (path,)


def read_vocabulary(path: str) -> dict[bytes, int]:
    """Token -> id.

    Raises:
        BadInput: Naming the line that is not as it should be, or saying that there is no such file.
    """
    found: dict[bytes, int] = {}
    try:
        with open(path, encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    index, literal, length = line.split(" ", 1)[0], *line.split(" ", 1)[1].rsplit(" ", 1)
                    token = ast.literal_eval(literal)
                    token = token.encode("utf-8") if isinstance(token, str) else bytes(token)
                    if len(token) != int(length):
                        raise ValueError("another length")
                    found[token] = int(index)
                except (ValueError, SyntaxError, IndexError, TypeError) as error:
                    raise BadInput(
                        f"Line {number} of {path!r} is no line of an RWKV vocabulary (an id, a string literal, its "
                        "length in bytes)."
                    ) from error
    except OSError as error:
        raise BadInput(f"There is no vocabulary {path!r}; give the path of rwkv_vocab_v20230424.txt.") from error
    missing = [byte for byte in range(256) if bytes([byte]) not in found]
    if missing:
        raise BadInput(f"The vocabulary {path!r} has no token for byte {missing[0]}, so not every text can be written.")
    return found
