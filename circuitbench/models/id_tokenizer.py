"""A tokenizer for models that have none: its words are the token ids themselves, so ``"5 17 3"`` is three tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

NAME = "token ids"


def id_tokenizer(config: PreTrainedConfig) -> PreTrainedTokenizerFast:
    """Token ids written as numbers; any other word is an error, not an unknown token.

    Args:
        config: The model's configuration: vocabulary size, and the special tokens if it names them.
    """
    text = config.get_text_config()
    backend = Tokenizer(WordLevel({str(index): index for index in range(text.vocab_size)}))
    backend.pre_tokenizer = WhitespaceSplit()
    # A special token is cut out of the text first, so that without `single_word` a "2" would split "24" in two.
    special = {
        f"{name}_token": AddedToken(str(index), single_word=True, normalized=False, special=True)
        for name in ("bos", "eos", "pad")
        if isinstance(index := getattr(text, f"{name}_token_id", None), int) and 0 <= index < text.vocab_size
    }
    special.setdefault("eos_token", AddedToken("0", single_word=True, normalized=False, special=True))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    tokenizer.name_or_path = NAME
    return tokenizer
