"""Tokenizers: trained with SentencePiece, exported for Hugging Face, and used for preparing data."""

import hashlib
import io
import itertools
import json
import math
import random
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import sentencepiece
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from megatron_ext.data.corpus import corpus_files, read_documents
from megatron_ext.errors import DataError
from megatron_ext.files import UNFINISHED, output_place, publish_directory, read_json_object
from megatron_ext.locks import exclusive_output

MODEL_FILE, FAST_FILE = "tokenizer.model", "tokenizer.json"
_CONTENTS = (FAST_FILE, MODEL_FILE, "tokenizer_config.json", "special_tokens_map.json")
_SPACE = "▁"
_UNK, _BOS, _EOS, _PAD = range(4)
_SPECIAL = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
_LONGEST_LINE = 4000
_PROOF_TEXTS = 500


class Tokenizer:
    """The tokenizer of a directory, for encoding documents: SentencePiece where there is a model, else tokenizers."""

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        if (self.directory / MODEL_FILE).is_file():
            self._pieces = _load_sentencepiece(self.directory / MODEL_FILE)
            self._newline = _newline_piece(self._pieces)
            self.vocab_size = self._pieces.get_piece_size()
            self.eod = self._pieces.eos_id()
        elif (self.directory / FAST_FILE).is_file():
            self._pieces = None
            self._fast = tokenizers.Tokenizer.from_file(str(self.directory / FAST_FILE))
            self.vocab_size = self._fast.get_vocab_size(with_added_tokens=True)
            self.eod = _end_of_text(self.directory, self._fast)
        else:
            raise DataError(f"{self.directory}: no tokenizer here ({MODEL_FILE} or {FAST_FILE})")

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without special tokens."""
        if self._pieces is not None:
            return _encode(self._pieces, self._newline, text)
        return list(self._fast.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: list[int]) -> str:
        """Text of token ids."""
        if self._pieces is not None:
            return str(self._pieces.decode(ids))
        return str(self._fast.decode(ids, skip_special_tokens=False))

    @property
    def fingerprint(self) -> str:
        """Changes when any token id could: data is tied to the tokenizer that made it by this."""
        name = MODEL_FILE if self._pieces is not None else FAST_FILE
        return hashlib.sha256((self.directory / name).read_bytes()).hexdigest()[:16]


def _load_sentencepiece(path: Path) -> sentencepiece.SentencePieceProcessor:
    try:
        return sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError) as error:
        raise DataError(f"{path}: not a SentencePiece model ({error})") from error


def _newline_piece(pieces: sentencepiece.SentencePieceProcessor) -> int | None:
    """The id of the newline where it always stands alone, so that lines can be encoded one by one."""
    newline = pieces.piece_to_id("\n")
    alone = pieces.encode("a\nb") == [*pieces.encode("a"), newline, *pieces.encode("b")]
    return newline if alone and not pieces.is_unknown(newline) else None


def _encode(pieces: sentencepiece.SentencePieceProcessor, newline: int | None, text: str) -> list[int]:
    """Encode `text`, line by line where possible.

    Over a long text SentencePiece's sums in single precision lose the difference between two segmentations.
    """
    if newline is None:
        return list(pieces.encode(text))
    ids: list[int] = []
    for line in pieces.encode(text.split("\n")):
        ids.extend(line)
        ids.append(newline)
    return ids[:-1]


def _end_of_text(directory: Path, fast: tokenizers.Tokenizer) -> int:
    settings_file = directory / "tokenizer_config.json"
    settings = read_json_object(settings_file, DataError) if settings_file.is_file() else {}
    token = settings.get("eos_token")
    token = token.get("content") if isinstance(token, dict) else token
    number = fast.token_to_id(token) if token else None
    if number is None:
        raise DataError(f"{settings_file}: names no eos_token of the vocabulary; documents could not be told apart")
    return int(number)


def train_sentencepiece(
    documents: Iterable[str], vocab_size: int, *, max_lines: int = 1_000_000, seed: int = 0, threads: int = 1
) -> bytes:
    """Train a unigram model with byte fallback that reproduces any text exactly, and return its bytes.

    Text is not normalised, spaces and indentation are kept, digits are single tokens and a newline is a token.

    Args:
        max_lines: lines to train on; more are sampled down evenly.

    Raises:
        DataError: the text cannot fill such a vocabulary.
    """
    model = io.BytesIO()
    lines = _sample_lines(documents, max_lines, seed)
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            vocab_size=vocab_size,
            model_type="unigram",
            byte_fallback=True,
            character_coverage=0.9995,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            user_defined_symbols=["\n"],
            # The letters of "</s>" and "<0x0A>": spelt out in a text they must have a reading as plain characters.
            required_chars="<>/0123456789ABCDEFxsunkpad",
            unk_id=_UNK,
            bos_id=_BOS,
            eos_id=_EOS,
            pad_id=_PAD,
            num_threads=threads,
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = str(error).rsplit("] ", 1)[-1]
        raise DataError(f"SentencePiece could not train {vocab_size} pieces on {len(lines)} lines: {reason}") from error
    return model.getvalue()


def _sample_lines(documents: Iterable[str], limit: int, seed: int) -> list[str]:
    """At most `limit` of the non-empty lines, each equally likely (reservoir sampling), in a fixed order."""
    generator, kept, seen = random.Random(seed), [], 0
    for document in documents:
        for line in _short_lines(document):
            seen += 1
            if len(kept) < limit:
                kept.append(line)
            elif (slot := generator.randrange(seen)) < limit:
                kept[slot] = line
    return kept


def _short_lines(document: str) -> Iterator[str]:
    for line in document.split("\n"):
        for start in range(0, len(line), _LONGEST_LINE):
            yield line[start : start + _LONGEST_LINE]


def export_tokenizer(model: bytes, directory: Path) -> None:
    """Write `model` to `directory` as SentencePiece and as a Hugging Face fast tokenizer that encodes alike.

    Raises:
        DataError: the model is of a kind whose fast counterpart would encode differently.
    """
    try:
        pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
    except RuntimeError as error:
        raise DataError("not a SentencePiece model") from error
    directory.mkdir(parents=True, exist_ok=True)
    (directory / MODEL_FILE).write_bytes(model)
    fast = _fast_tokenizer(pieces)
    fast.save(str(directory / FAST_FILE))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **_SPECIAL,
        "clean_up_tokenization_spaces": False,
        "add_bos_token": False,
        "add_eos_token": False,
        "model_max_length": 1 << 30,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    (directory / "special_tokens_map.json").write_text(json.dumps(_SPECIAL, indent=2) + "\n")


def _fast_tokenizer(pieces: sentencepiece.SentencePieceProcessor) -> tokenizers.Tokenizer:
    probe = " a  b\n"
    if pieces.decode(pieces.encode(probe)) != probe:
        raise DataError("only models that keep text as it is (identity normalization, no dummy prefix) can be exported")
    vocabulary = [(pieces.id_to_piece(i), _matching_score(pieces, i)) for i in range(pieces.get_piece_size())]
    fast = tokenizers.Tokenizer(models.Unigram(vocabulary, unk_id=pieces.unk_id(), byte_fallback=True))
    fast.pre_tokenizer = pre_tokenizers.Metaspace(replacement=_SPACE, prepend_scheme="never", split=False)
    fast.decoder = decoders.Sequence([decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    fast.add_special_tokens(
        [
            AddedToken(p, special=True, normalized=False)
            for i, (p, _) in enumerate(vocabulary)
            if pieces.is_control(i) or pieces.is_unknown(i)
        ]
    )
    fast.add_tokens(
        [AddedToken(p, normalized=False) for i, (p, _) in enumerate(vocabulary) if _is_user_defined(pieces, i)]
    )
    return fast


def _matching_score(pieces: sentencepiece.SentencePieceProcessor, number: int) -> float:
    """Log-probability of a piece.

    SentencePiece never finds control and byte pieces in text ("<s>" spelt out is three characters); tokenizers would,
    unless that is unlikely.
    """
    hidden = pieces.is_control(number) or pieces.is_unknown(number) or pieces.is_byte(number)
    return -1000.0 if hidden else float(pieces.get_score(number))


def _is_user_defined(pieces: sentencepiece.SentencePieceProcessor, number: int) -> bool:
    """User-defined pieces are cut out of the text before anything else; SentencePiece gives them score 0."""
    plain = not (pieces.is_control(number) or pieces.is_unknown(number) or pieces.is_byte(number))
    return plain and pieces.get_score(number) == 0.0


def disagreements(directory: Path, texts: Iterable[str]) -> int:
    """How many of `texts` the SentencePiece model and the exported fast tokenizer of `directory` read differently.

    Segmentations of equal probability count as the same: the two break such ties differently ("***" may be "*", "**"
    or "**", "*"). Both read a special token that is spelt out in the text (`</s>`) as plain text here, as data
    preparation does; by default the fast tokenizer would take it for the token itself.
    """
    pieces = _load_sentencepiece(directory / MODEL_FILE)
    newline = _newline_piece(pieces)
    fast = tokenizers.Tokenizer.from_file(str(directory / FAST_FILE))
    fast.encode_special_tokens = True
    different = 0
    for text in texts:
        ours, theirs = _encode(pieces, newline, text), fast.encode(text, add_special_tokens=False).ids
        if ours != theirs:
            scores = [math.fsum(pieces.get_score(i) for i in ids) for ids in (ours, theirs)]
            # A tie in single precision: sums of a line are below 1e3, where fp32 resolves 6e-5, and lines add up.
            is_tie = abs(scores[0] - scores[1]) < 1e-4 * (1 + text.count("\n"))
            different += not (is_tie and pieces.decode(theirs) == text)
    return different


def train_tokenizer(
    inputs: Sequence[str | Path],
    output: str | Path,
    vocab_size: int,
    *,
    text_key: str = "text",
    max_lines: int = 1_000_000,
    threads: int = 1,
    force: bool = False,
) -> Tokenizer:
    """Train a tokenizer on the documents of `inputs` and write it to `output`."""
    files = corpus_files(inputs)
    output_place(output, DataError, force=force, contents=_CONTENTS, inputs=files)
    with exclusive_output(output, "training a tokenizer"):
        model = train_sentencepiece(read_documents(files, text_key), vocab_size, max_lines=max_lines, threads=threads)
        texts = itertools.islice(read_documents(files, text_key), _PROOF_TEXTS)
        return write_tokenizer(model, output, texts, force=force)


def write_tokenizer(model: bytes, output: str | Path, texts: Iterable[str], *, force: bool = False) -> Tokenizer:
    """Write `model` and its Hugging Face counterpart to `output`, after proving on `texts` that both encode alike.

    Raises:
        DataError: they do not, or `output` exists and `force` is not set.
    """
    output = output_place(output, DataError, force=force, contents=_CONTENTS)
    beside = output.with_name(output.name + UNFINISHED)
    with exclusive_output(output, "exporting a tokenizer"):
        shutil.rmtree(beside, ignore_errors=True)
        export_tokenizer(model, beside)
        texts = list(texts)
        if different := disagreements(beside, texts):
            shutil.rmtree(beside)
            raise DataError(f"{different} of {len(texts)} texts are encoded differently by the exported fast tokenizer")
        publish_directory(beside, output, replace=force)
    return Tokenizer(output)
