"""Tokenizers: one definition of token ids for data, model, export and generation; training; export of SentencePiece."""

from megatron_ext.data.tokenizer.load import load_tokenizer
from megatron_ext.data.tokenizer.reading import Tokenizer

__all__ = ["Tokenizer", "load_tokenizer"]
