"""Tokenizers: one definition of token ids for data, model, export and generation; training; export of SentencePiece."""

from megatron_ext.data.tokenizer.export import disagreements, write_tokenizer
from megatron_ext.data.tokenizer.load import load_tokenizer
from megatron_ext.data.tokenizer.reading import Tokenizer
from megatron_ext.data.tokenizer.training import train_tokenizer

__all__ = ["Tokenizer", "disagreements", "load_tokenizer", "train_tokenizer", "write_tokenizer"]
