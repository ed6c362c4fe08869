"""The tokenizer of data, model, export and generation: token ids of plain text, as transformers' own class gives them.

A document's ids are those of `tokenizer(text, add_special_tokens=False, split_special_tokens=True)`, whole: truncation
and padding that tokenizer.json may have stored do not count. Special tokens spelt out in a document stay text, also
where the vocabulary has a piece of that name: only preparation itself ends documents. Added tokens that are not special
count as tokens.
"""

import copy
import hashlib
import json
import logging
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from megatron_ext.checkpoint.tokenizer_files import (
    ADDED_FILE,
    FAST_FILE,
    MODEL_FILE,
    PIECE_FILES,
    SETTINGS_FILE,
    SPECIAL_FILE,
)
from megatron_ext.data.tokenizer.load import load_tokenizer, read_by_one_thread
from megatron_ext.data.tokenizer.pieces import encode_lines, load_sentencepiece
from megatron_ext.data.tokenizer.probe import HARD_TEXTS
from megatron_ext.errors import DataError
from megatron_ext.files import read_json_object

log = logging.getLogger(__name__)

_HIDDEN = "\0special {}\0"
"""What a piece is called that no text should be read as."""
_NAMED_TOKENS = 16
"""Transformers puts tokens that a folder names and its vocabulary lacks at the end: no more than these."""


class Tokenizer:
    """The tokenizer of a directory, for encoding documents. It can be sent to other processes.

    Attributes:
        directory: where it stands.
        vocab_size: the largest token id and one more; ids may have gaps.
        eod: id of the token that ends a document, the tokenizer's `eos_token`.
        eod_token: how that is spelt.

    Raises:
        DataError: there is no tokenizer, none that can be read, or one without an `eos_token`.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        loaded = load_tokenizer(self.directory)
        self.vocabulary: dict[str, int] = loaded.get_vocab()
        if not self.vocabulary:
            raise DataError(f"{self.directory}: the vocabulary is empty")
        self.vocab_size = max(self.vocabulary.values()) + 1
        self._added = loaded.added_tokens_decoder
        self.eod, self.eod_token = end_of_document(self.directory, loaded)
        self._backend = getattr(loaded, "backend_tokenizer", None)
        self._control = _marks(loaded, self._backend) | {self.eod}
        self._loaded = None if _reads_alone(loaded, self._backend) else loaded
        if self._backend is not None:
            _set_plain(self._backend)
        if (self.directory / MODEL_FILE).is_file() and not (self.directory / FAST_FILE).is_file():
            self._compare_with_sentencepiece(type(loaded).__name__)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_spelt"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        read_by_one_thread()
        if self._backend is not None:
            _set_plain(self._backend)  # which the tokenizers library does not save

    def with_backend(self, backend: tokenizers.Tokenizer) -> "Tokenizer":
        """A copy that cuts text by another object of the tokenizers library, of the same tokens."""
        other = copy.copy(self)
        other._backend = backend
        _set_plain(backend)
        return other

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without special tokens.

        Raises:
            DataError: `text` spells the token that ends documents and the vocabulary cannot write it in another way,
                or it has characters for which there is that token only.
        """
        return self._as_text(text, self._read(text))

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """What `encode` gives for each of `texts`, for less."""
        if self.fast is None:
            return [self.encode(text) for text in texts]
        read = self.fast.encode_batch_fast(list(texts), add_special_tokens=False)
        return [self._as_text(text, one.ids) for text, one in zip(texts, read, strict=True)]

    def _as_text(self, text: str, ids: list[int]) -> list[int]:
        """`ids`, read from `text`, or where they have a special token, those that spell it."""
        if self._control.isdisjoint(ids):
            return ids
        ids = _ids(self._spelt, text) if self._spelt is not None else ids
        if self.eod in ids:
            raise DataError(
                f"{self.directory}: reads token {self.eod} ({self.eod_token!r}), which ends documents, out of the text "
                "of one, and has no other way to write that text; remove it from the corpus, or use another tokenizer"
            )
        return ids

    @property
    def backend(self) -> tokenizers.Tokenizer | None:
        """What cuts text into tokens; None for a tokenizer that is Python code."""
        return self._backend

    def spells(self, text: str) -> str | None:
        """A special token that is spelt out in `text`, if one is: `encode` takes it for text."""
        found = self._spelling.search(text) if self._spelling is not None else None
        return found[0] if found is not None else None

    @cached_property
    def _spelling(self) -> re.Pattern[str] | None:
        spelt = [re.escape(token) for token, number in self.vocabulary.items() if number in self._control]
        return re.compile("|".join(spelt)) if spelt else None

    @property
    def fast(self) -> tokenizers.Tokenizer | None:
        """The tokenizers library's object, where that alone gives the ids of text."""
        return self._backend if self._loaded is None else None

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids of tokens that text is never read as, however it spells them."""
        return self._control

    def _read(self, text: str) -> list[int]:
        if self._loaded is None:
            assert self._backend is not None
            return _ids(self._backend, text)
        return _as_transformers(self._loaded, text)

    @cached_property
    def _spelt(self) -> tokenizers.Tokenizer | None:
        """The same tokenizer without pieces that are special tokens."""
        return None if self._backend is None else _without(self._backend, self._control, self.vocabulary)

    def decode(self, ids: list[int]) -> str:
        """Text of token ids."""
        if self._backend is not None:
            return str(self._backend.decode(ids, skip_special_tokens=False))
        assert self._loaded is not None
        return str(self._loaded.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    @cached_property
    def probe(self) -> list[list[int]]:
        """Ids of texts that are easy to read differently: a change in any library shows here."""
        return [self._read(text) for text in HARD_TEXTS]

    @cached_property
    def fingerprint(self) -> str:
        """Changes when any token id of a document could: data is tied to the tokenizer that made it by this.

        It depends on what the tokenizer does, not on how its files are written: vocabulary, merges or scores, added
        tokens, the end of documents, and `probe`.
        """
        added = [
            (number, token.content, token.special, token.lstrip, token.rstrip, token.single_word, token.normalized)
            for number, token in sorted(self._added.items())
        ]
        content = [sorted(self.vocabulary.items()), rules_of(self._backend), added, self.eod, self.probe]
        # Whatever a vocabulary spells: byte pieces of some are no valid text.
        digest = hashlib.sha256(json.dumps(content).encode("utf-8", "surrogatepass"))
        return f"ids-{digest.hexdigest()[:16]}"

    def _compare_with_sentencepiece(self, class_name: str) -> None:
        """Say where transformers reads a tokenizer.model otherwise than SentencePiece does.

        Raises:
            DataError: and nothing beside it names the class to read it with.
        """
        path = self.directory / MODEL_FILE
        pieces = load_sentencepiece(path)
        self._control |= {i for i in range(pieces.get_piece_size()) if pieces.is_control(i)}
        # SentencePiece knows nothing of tokens that were added to it, and classes treat a space in front in their way.
        texts = [text for text in HARD_TEXTS if not any(token.content in text for token in self._added.values())]
        if (self.directory / SETTINGS_FILE).is_file():
            texts = [text for text in texts if text[:1].isalnum()]
        different = [text for text in texts if self.encode(text) != encode_lines(pieces, text)]
        if not different:
            return
        what = f"{path}: transformers ({class_name}) reads it otherwise than SentencePiece does"
        if not (self.directory / SETTINGS_FILE).is_file():
            raise DataError(
                f"{what}, such as {different[0][:40]!r}; put the tokenizer.json or tokenizer_config.json of its model "
                "beside it. A model that keeps text as it is can be exported: tools/tokenizer.py export "
                f"{path} --output DIR"
            )
        log.warning(
            "%s, %d of %d texts such as %r: ids are those of transformers, as in generation. Is %s the right "
            "tokenizer_class?",
            *(what, len(different), len(texts), different[0][:40], class_name),
        )


def rules_of(backend: tokenizers.Tokenizer | None) -> list[Any]:
    """The merges, or the scores, by which a tokenizer cuts text, however its file writes them."""
    model = {} if backend is None else json.loads(backend.to_str())["model"]
    scores = model["vocab"] if isinstance(model.get("vocab"), list) else []
    return [[_pair(merge) for merge in model.get("merges") or []], scores]


def _marks(loaded: Any, backend: tokenizers.Tokenizer | None) -> frozenset[int]:
    """Ids of special tokens that a text must not be read as.

    The token for unknown characters is no mark, and one character is none: some pad with "!".
    """
    named = {loaded.unk_token_id}
    if backend is not None:
        model = json.loads(backend.to_str())["model"]
        named |= {model.get("unk_id"), backend.token_to_id(model.get("unk_token") or "")}
    added = loaded.added_tokens_decoder
    return frozenset(i for i, token in added.items() if token.special and len(token.content) > 1 and i not in named)


def _set_plain(backend: tokenizers.Tokenizer) -> None:
    """Whole texts, in which special tokens are text."""
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True


def _ids(backend: tokenizers.Tokenizer, text: str) -> list[int]:
    """Without where in the text each stands, which takes half as long again."""
    return list(backend.encode_batch_fast([text], add_special_tokens=False)[0].ids)


def _as_transformers(loaded: Any, text: str) -> list[int]:
    """The definition of a document's ids."""
    read = loaded(
        text,
        add_special_tokens=False,
        split_special_tokens=True,
        truncation=False,
        padding=False,
        verbose=False,
        return_attention_mask=False,
        return_token_type_ids=False,
    )
    return list(read.input_ids)


def _reads_alone(loaded: Any, backend: tokenizers.Tokenizer | None) -> bool:
    """Whether the tokenizers library alone gives the ids of transformers' class around it, for several times faster."""
    if backend is None:
        return False
    expected = [list(_as_transformers(loaded, text)) for text in HARD_TEXTS]
    _set_plain(backend)
    return expected == [_ids(backend, text) for text in HARD_TEXTS]


def end_of_document(directory: Path, loaded: Any) -> tuple[int, str]:
    """Id and spelling of the token that ends a document: the `eos_token` of the tokenizer `loaded` from `directory`.

    Raises:
        DataError: it has none, or names one that is not in its vocabulary.
    """
    token, number, vocabulary = loaded.eos_token, loaded.eos_token_id, loaded.get_vocab()
    if number is None and (directory / SPECIAL_FILE).is_file():
        # Transformers leaves this file unread where tokenizer_config.json is of a later form.
        said = read_json_object(directory / SPECIAL_FILE, DataError).get("eos_token")
        token = said.get("content") if isinstance(said, dict) else said
        number = vocabulary.get(token) if isinstance(token, str) else None
    invented = number is not None and number >= len(vocabulary) - _NAMED_TOKENS and not _stands_in(directory, token)
    if number is None or invented or number not in vocabulary.values():
        what = f"names {token!r} as eos_token, which is no token of the vocabulary" if token else "names no eos_token"
        raise DataError(
            f"{directory}: the tokenizer {what}; documents could not be told apart. Set eos_token in "
            f"{SETTINGS_FILE} to the token that ends a document (a SentencePiece model: train it with an eos_id)"
        )
    return int(number), str(token)


def _stands_in(directory: Path, token: str) -> bool:
    """Whether a file of `directory` gives `token` an id: transformers adds tokens that are only named."""
    settings_file, added_file = directory / SETTINGS_FILE, directory / ADDED_FILE
    settings = read_json_object(settings_file, DataError) if settings_file.is_file() else {}
    added = read_json_object(added_file, DataError) if added_file.is_file() else {}
    decoder = settings.get("added_tokens_decoder") or {}
    if token in added or any(one.get("content") == token for one in decoder.values() if isinstance(one, dict)):
        return True
    if (directory / FAST_FILE).is_file():
        return tokenizers.Tokenizer.from_file(str(directory / FAST_FILE)).token_to_id(token) is not None
    for name in PIECE_FILES:
        if (directory / name).is_file():
            pieces = load_sentencepiece(directory / name)
            return str(pieces.id_to_piece(pieces.piece_to_id(token))) == token
    if (directory / "vocab.json").is_file():
        return token in read_json_object(directory / "vocab.json", DataError)
    if (directory / "vocab.txt").is_file():
        return token in (directory / "vocab.txt").read_text(encoding="utf-8").splitlines()
    return True  # a kind whose files are not known here


def _without(
    backend: tokenizers.Tokenizer, control: frozenset[int], vocabulary: dict[str, int]
) -> tokenizers.Tokenizer:
    """A tokenizer that finds no token of `control` in text, neither as an added one nor as a piece."""
    content = json.loads(backend.to_str())
    model, spelt = content["model"], {token for token, number in vocabulary.items() if number in control}
    pieces = model.get("vocab")
    spelt.discard(pieces[model["unk_id"]][0] if model.get("unk_id") is not None else model.get("unk_token"))
    if isinstance(pieces, list):  # Unigram: pieces and scores, in the order of their ids
        in_model = {piece for piece, _ in pieces} & spelt
        model["vocab"] = [[_HIDDEN.format(piece) if piece in spelt else piece, score] for piece, score in pieces]
    elif isinstance(pieces, dict):
        in_model = pieces.keys() & spelt
        model["vocab"] = {_HIDDEN.format(piece) if piece in spelt else piece: i for piece, i in pieces.items()}
    else:
        in_model = set()
    if model.get("merges"):
        model["merges"] = [merge for merge in model["merges"] if "".join(_pair(merge)) not in spelt]
    # The ids of added tokens follow those of the model: what is left of them must not move up.
    content["added_tokens"] = [
        {**token, "special": token["special"] or token["id"] in control}
        for token in content["added_tokens"]
        if token["content"] not in in_model
    ]
    plain = tokenizers.Tokenizer.from_str(json.dumps(content))
    _set_plain(plain)
    return plain


def _pair(merge: str | list[str]) -> list[str]:
    """The two pieces that are merged: the tokenizers library writes them in one text or in two."""
    return merge if isinstance(merge, list) else merge.split(" ")
