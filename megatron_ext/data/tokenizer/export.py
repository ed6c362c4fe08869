"""Writes a SentencePiece model beside the Hugging Face fast tokenizer that is proven to encode alike."""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import sentencepiece

from megatron_ext.checkpoint.tokenizer_files import FAST_FILE, MODEL_FILE, SETTINGS_FILE, SPECIAL_FILE
from megatron_ext.data.tokenizer.fast import fast_tokenizer
from megatron_ext.data.tokenizer.load import load_tokenizer
from megatron_ext.data.tokenizer.model_file import BPE, SPACE, UNIGRAM, read_model_file
from megatron_ext.data.tokenizer.pieces import encode_lines, load_sentencepiece, sentencepiece_of
from megatron_ext.data.tokenizer.probe import HARD_TEXTS, nasty_texts, texts_of
from megatron_ext.data.tokenizer.reading import Tokenizer
from megatron_ext.errors import DataError
from megatron_ext.files import output_place, publish_directory, remove_unfinished, start_directory, writing
from megatron_ext.locks import exclusive_output

CONTENTS = (FAST_FILE, MODEL_FILE, SETTINGS_FILE, SPECIAL_FILE)
"""What stands in a tokenizer's directory."""


def write_tokenizer(
    model: bytes, output: str | Path, texts: Iterable[str], *, force: bool = False, source: str = "the model"
) -> Tokenizer:
    """Write `model` and its Hugging Face counterpart to `output`, after proving that both encode alike.

    They are compared on `texts`, on all pieces of the vocabulary, and on spaces, scripts and Unicode that is easy to
    read differently.

    Args:
        source: where `model` is from, for messages.

    Raises:
        DataError: they do not, or `output` exists and `force` is not set; nothing is written.
    """
    output = output_place(output, DataError, force=force, contents=CONTENTS)
    with exclusive_output(output, "exporting a tokenizer"), writing(output):
        beside = start_directory(output)
        try:
            pieces = export_tokenizer(model, beside, source)
            texts = [*HARD_TEXTS, *nasty_texts(), *texts_of(_spelt(pieces)), *texts]
            if different := disagreements(Tokenizer(beside), texts):
                raise DataError(
                    f"{len(different)} of {len(texts)} texts, such as {different[0][:60]!r}, are encoded otherwise by "
                    f"the fast tokenizer that Hugging Face would use{_why(model, source)}: this model cannot be "
                    f"exported. {_KINDS}"
                )
        except BaseException:
            remove_unfinished(beside)
            raise
        publish_directory(beside, output, replace=force)
    return Tokenizer(output)


_KINDS = (
    "Unigram and BPE models that keep text as it is (normalization_rule_name=identity, remove_extra_whitespaces=false) "
    "can; tools/tokenizer.py train makes such a one. A published model needs no export: give its directory, with the "
    "tokenizer.json or tokenizer_config.json that came with it, to tools/preprocess.py as it is"
)


def _why(model: bytes, source: str) -> str:
    """What the model does that a fast tokenizer does not do alike, as far as its settings say."""
    rules = read_model_file(model, source).proto.normalizer_spec
    reasons = {
        f"it normalises text by {rules.name}": bool(rules.precompiled_charsmap),
        "it removes spaces (remove_extra_whitespaces)": rules.remove_extra_whitespaces,
        "it puts a space in front (add_dummy_prefix)": rules.add_dummy_prefix,
    }
    found = [reason for reason, does in reasons.items() if does]
    return f" ({', '.join(found)})" if found else ""


def export_tokenizer(model: bytes, directory: Path, source: str) -> sentencepiece.SentencePieceProcessor:
    """Write `model` to the folder `directory` as SentencePiece and as a fast tokenizer; return it, loaded.

    Raises:
        DataError: it is no such model, has no token that ends documents, or no fast tokenizer can be made of it.
    """
    pieces = sentencepiece_of(model, source)
    (directory / MODEL_FILE).write_bytes(model)
    if pieces.eos_id() < 0:
        raise DataError(
            "the SentencePiece model has no end-of-sentence piece (eos_id is -1): documents could not be told apart; "
            "train it with an eos_id"
        )
    read = read_model_file(model, source)
    prefix = bool(read.proto.normalizer_spec.add_dummy_prefix)
    if read.proto.trainer_spec.model_type in (UNIGRAM, BPE) and not prefix:
        fast = fast_tokenizer(read)
    else:
        # What transformers makes of it; whether that encodes alike is seen on texts.
        fast = load_tokenizer(directory).backend_tokenizer
    fast.save(str(directory / FAST_FILE))
    ids = {"unk": pieces.unk_id(), "bos": pieces.bos_id(), "eos": pieces.eos_id(), "pad": pieces.pad_id()}
    special = {f"{name}_token": pieces.id_to_piece(number) for name, number in ids.items() if number >= 0}
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **special,
        "clean_up_tokenization_spaces": False,
        "add_bos_token": False,
        "add_eos_token": False,
        "add_prefix_space": prefix,  # llama.cpp prepends a space where it is not said
        "padding_side": "left",  # of prompts of different length, whose answers follow on the right
        "model_max_length": 1 << 30,
    }
    (directory / SETTINGS_FILE).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    (directory / SPECIAL_FILE).write_text(json.dumps(special, indent=2) + "\n", encoding="utf-8")
    return pieces


def _spelt(pieces: sentencepiece.SentencePieceProcessor) -> list[str]:
    """What every piece looks like in text."""
    return [str(pieces.id_to_piece(i)).replace(SPACE, " ") for i in range(pieces.get_piece_size())]


def disagreements(tokenizer: Tokenizer, texts: Iterable[str]) -> list[str]:
    """Those of `texts` that the SentencePiece model in the directory of `tokenizer` reads otherwise than `tokenizer`.

    Segmentations of equal probability, of a unigram model, count as the same: the two break such ties differently
    ("***" may be "*", "**" or "**", "*"). Both read a special token that is spelt out in the text (`</s>`) as plain
    text here, as data preparation does; by default transformers would take it for the token itself.
    """
    path = tokenizer.directory / MODEL_FILE
    pieces, has_ties = load_sentencepiece(path), read_model_file(path.read_bytes(), str(path)).is_unigram
    different = []
    for text in texts:
        ours, theirs = encode_lines(pieces, text), tokenizer.encode(text)
        if ours != theirs:
            scores = [math.fsum(pieces.get_score(i) for i in ids) for ids in (ours, theirs)]
            # A tie in single precision: sums of a line are below 1e3, where fp32 resolves 6e-5, and lines add up.
            is_tie = has_ties and abs(scores[0] - scores[1]) < 1e-4 * (1 + text.count("\n"))
            if not is_tie or pieces.decode(theirs) != pieces.decode(ours):
                different.append(text)
    return different
