"""Word-level tokenizers of the captions, in the formats that CLIP and T5 load."""

import json
import re
import string
from collections.abc import Iterable

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTokenizer, T5Tokenizer

from diffattn.tiny import moving
from diffattn.tiny.shapes import captions, scenes

MAX_TOKENS = 32
"""Tokens per caption of an image, for both encoders, the padding included."""

MAX_VIDEO_TOKENS = 16
"""Tokens per caption of a video, the padding included."""


def caption_words() -> list[str]:
    """The words and punctuation of every caption, sorted."""
    return words_of(text for scene in scenes() for text in captions(scene))


def video_caption_words() -> list[str]:
    """The words of every caption of a moving scene, sorted."""
    texts = (moving.caption(scene, shape=named) for scene in moving.scenes() for named in (True, False))
    return words_of(texts)


def words_of(texts: Iterable[str]) -> list[str]:
    """The distinct words and punctuation of `texts`, sorted."""
    return sorted({word for text in texts for word in re.findall(r"\w+|[^\w\s]", text)})


def clip_tokenizer(words: Iterable[str], max_tokens: int = MAX_TOKENS) -> CLIPTokenizer:
    """Byte-pair tokenizer in which each of `words` is one token; other words fall apart into shorter pieces.

    The merges come from training on the words themselves; the lower-case printable ASCII characters are the alphabet.
    """
    letters = [character for character in string.printable if not character.isspace() and not character.isupper()]
    trained = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    trained.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.BpeTrainer(
        vocab_size=10_000, initial_alphabet=letters, end_of_word_suffix="</w>", show_progress=False
    )
    trained.train_from_iterator([*(word.lower() for word in words), *letters], trainer)
    model = json.loads(trained.to_str())["model"]
    vocab: dict[str, int] = model["vocab"]
    for special in ("<|startoftext|>", "<|endoftext|>"):
        vocab[special] = len(vocab)
    merges = [tuple(merge) for merge in model["merges"]]
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=max_tokens)


def t5_tokenizer(words: Iterable[str]) -> T5Tokenizer:
    """Unigram tokenizer with one piece per word; other words fall apart into single characters."""
    letters = [character for character in string.printable if not character.isspace()]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -8.0)]
    pieces += [(f"\u2581{word}", -2.0) for word in words] + [(letter, -8.0) for letter in letters]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=MAX_TOKENS)
