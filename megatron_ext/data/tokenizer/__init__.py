"""Tokenizers: one definition of token ids for data, model, export and generation; how they are made."""

from megatron_ext.data.tokenizer.compare import compare_tokenizers
from megatron_ext.data.tokenizer.export import disagreements, write_tokenizer
from megatron_ext.data.tokenizer.fertility_report import fertility_lines, write_plot
from megatron_ext.data.tokenizer.load import load_tokenizer
from megatron_ext.data.tokenizer.merge_files import Language, merge_tokenizers
from megatron_ext.data.tokenizer.names import read_names
from megatron_ext.data.tokenizer.pieces import read_model
from megatron_ext.data.tokenizer.reading import Tokenizer
from megatron_ext.data.tokenizer.training import Training, train_tokenizer

__all__ = [
    "Language",
    "Tokenizer",
    "Training",
    "compare_tokenizers",
    "disagreements",
    "fertility_lines",
    "load_tokenizer",
    "merge_tokenizers",
    "read_model",
    "read_names",
    "train_tokenizer",
    "write_plot",
    "write_tokenizer",
]
