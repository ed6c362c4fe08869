"""Small tokenizers of every kind that models come with."""

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import sentencepiece
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from tests.support.workspace import WORDS

LINES = [f"{' '.join(WORDS[n % 7 : n % 7 + 9])} {n}, user assistant\n日本語 {n}" for n in range(60)]

O200K = "|".join(
    [
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ]
)
"""The words of gpt-oss and GPT-4o."""


def harmony() -> Tokenizer:
    """As gpt-oss: bytes of the words above, and the marks of its chats."""
    tokenizer = Tokenizer(models.BPE())
    words = pre_tokenizers.Split(Regex(O200K), behavior="removed", invert=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(LINES, trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet))
    tokenizer.add_special_tokens(["<|startoftext|>", "<|endoftext|>", "<|return|>", "<|start|>", "<|message|>"])
    return tokenizer


def byte_level(size: int = 350) -> Tokenizer:
    """As GPT-2, Llama 3 and Qwen."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|endoftext|>", "<|im_end|>"]
    tokenizer.train_from_iterator(
        LINES, trainers.BpeTrainer(vocab_size=size, special_tokens=special, initial_alphabet=alphabet)
    )
    return tokenizer


def unigram(normalizer: Any = None) -> Tokenizer:
    """As T5 and its kind: special tokens are pieces of score 0, which a text could be read as."""
    pieces = [("<pad>", 0.0), ("<|endoftext|>", 0.0), ("<unk>", 0.0)]
    pieces += [("▁" + word, -3.0 - n / 10) for n, word in enumerate(dict.fromkeys(WORDS))]
    pieces += [(chr(code), -9.0) for code in range(0x21, 0x7F)] + [("▁", -5.0), ("日本", -8.0)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(["<pad>", "<|endoftext|>", "<unk>"])
    return tokenizer


def word_piece() -> Tokenizer:
    """As BERT."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    special = ["[UNK]", "<|endoftext|>"]
    tokenizer.train_from_iterator(LINES, trainers.WordPieceTrainer(vocab_size=300, special_tokens=special))
    return tokenizer


def with_marks(tokenizer: Tokenizer) -> Tokenizer:
    """With a mark that is no special token, one at the beginning of every text, truncation and padding."""
    tokenizer.add_tokens([AddedToken("<tool>", special=False, normalized=False)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", tokenizer.token_to_id("<|endoftext|>"))]
    )
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=16, pad_id=9, pad_token="!")
    return tokenizer


def write(tokenizer: Tokenizer, directory: Path, **settings: Any) -> Path:
    """Write it as a Hugging Face directory; `settings` go into tokenizer_config.json."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    write_settings(directory, {"eos_token": "<|endoftext|>", **settings})
    return directory


def write_settings(directory: Path, settings: Mapping[str, Any], name: str = "tokenizer_config.json") -> None:
    """Write a JSON file of a tokenizer."""
    named = {"tokenizer_class": "PreTrainedTokenizerFast"} if name == "tokenizer_config.json" else {}
    (directory / name).write_text(json.dumps({**named, **settings}))


def sentencepiece_model(**options: Any) -> bytes:
    """A SentencePiece model that keeps text as it is, but for `options`."""
    model = io.BytesIO()
    settings = {
        "vocab_size": 330,
        "hard_vocab_limit": False,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "add_dummy_prefix": False,
        "remove_extra_whitespaces": False,
        "required_chars": "<>/0123456789ABCDEFxsunkpad",
        "minloglevel": 2,
        **options,
    }
    lines = [line for text in LINES for line in text.split("\n")]
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=model, **settings)
    return model.getvalue()
