"""The fast tokenizer, for Hugging Face, of a SentencePiece model that keeps text as it is."""

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

from megatron_ext.data.tokenizer.model_file import BYTE, CONTROL, NORMAL, SPACE, UNKNOWN, USER_DEFINED, Model
from megatron_ext.errors import DataError

_NEVER = -1000.0
"""Log-probability of a piece that is not to be found in text."""


def fast_tokenizer(model: Model) -> tokenizers.Tokenizer:
    """A fast tokenizer for `model`, a unigram or BPE model without normalisation and without a space put in front.

    Whether it reads every text alike is for the caller to prove.

    Raises:
        DataError: it could not.
    """
    symbols = [piece.text for piece in model.of(USER_DEFINED)]
    fast = tokenizers.Tokenizer(_unigram(model) if model.is_unigram else _bpe(model))
    spaced = [symbol for symbol in symbols if SPACE in symbol]
    if spaced and model.is_unigram:  # which weighs them against pieces that begin with a space
        raise DataError(
            f"the user-defined symbol {spaced[0]!r} has spaces, which a fast tokenizer would not find where this one "
            "does; train the model without it (allow_whitespace_only_pieces makes pieces of spaces)"
        )
    if spaced:  # they are looked for once spaces are written as pieces have them: all of them, so that the longest wins
        fast.normalizer = normalizers.Replace(" ", SPACE)
    else:
        fast.pre_tokenizer = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="never", split=False)
    fast.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    fast.add_special_tokens(
        [AddedToken(piece.text, special=True, normalized=False) for piece in model.of(CONTROL, UNKNOWN)]
    )
    fast.add_tokens([AddedToken(symbol, normalized=bool(spaced)) for symbol in symbols])
    return fast


def _unigram(model: Model) -> models.Unigram:
    """The model with its scores, but for pieces that are in no text.

    SentencePiece never finds control and byte pieces ("<s>" spelt out is three characters); tokenizers would, unless
    that is unlikely.
    """
    found = (NORMAL, USER_DEFINED)
    vocabulary = [(piece.text, piece.score if piece.type in found else _NEVER) for piece in model.pieces]
    unknown = next(number for number, piece in enumerate(model.pieces) if piece.type == UNKNOWN)
    return models.Unigram(vocabulary, unk_id=unknown, byte_fallback=bool(model.of(BYTE)))


def _bpe(model: Model) -> models.BPE:
    """Two pieces merge where their text together is a normal piece, the best first: all such pairs, as merges."""
    vocabulary = {piece.text: number for number, piece in enumerate(model.pieces)}
    normal = {piece.text for piece in model.of(NORMAL)}
    merges = [
        (text[:place], text[place:])
        for text in sorted(normal, key=lambda text: (-model.pieces[vocabulary[text]].score, vocabulary[text]))
        for place in range(1, len(text))
        if text[:place] in normal and text[place:] in normal
    ]
    (unknown,) = model.of(UNKNOWN)
    return models.BPE(vocabulary, merges, unk_token=unknown.text, fuse_unk=True, byte_fallback=bool(model.of(BYTE)))
