"""A character-level tokenizer for small models: every character is one token."""

import string
from collections.abc import Iterable
from typing import Any

PAD, EOS, UNKNOWN = "<pad>", "<eos>", "<unk>"


def build_character_tokenizer(texts: Iterable[str] = (), *, max_length: int = 512) -> Any:
    """A `transformers.PreTrainedTokenizerFast` over printable ASCII plus every character found in `texts`.

    Pads on the left, as generation needs; ids are the same whatever the order of `texts`. Decoding joins characters
    without blanks, so that ``decode(encode(text)) == text`` for known characters.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    ascii_characters = string.digits + string.ascii_letters + string.punctuation + " \n\t"
    extra = sorted({character for text in texts for character in text} - set(ascii_characters))
    vocabulary = {token: index for index, token in enumerate([PAD, EOS, UNKNOWN, *ascii_characters, *extra])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNKNOWN,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=max_length,
    )


def is_character_tokenizer(tokenizer: Any) -> bool:
    """Whether a tokenizer is one that :func:`build_character_tokenizer` made, or was loaded from one."""
    vocabulary = tokenizer.get_vocab()
    return {PAD, EOS, UNKNOWN} <= set(vocabulary) and all(
        len(token) == 1 for token in vocabulary if token not in (PAD, EOS, UNKNOWN)
    )
