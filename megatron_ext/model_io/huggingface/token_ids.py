"""The tokens that an exported model begins, ends and pads with, and the tokens it has no rows for."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_ext.checkpoint.tokenizer_files import GENERATION_FILE, VOCABULARIES
from megatron_ext.data.tokenizer.load import load_tokenizer
from megatron_ext.data.tokenizer.probe import HARD_TEXTS
from megatron_ext.data.tokenizer.reading import end_of_document
from megatron_ext.errors import ConversionError, DataError
from megatron_ext.files import read_json_object

log = logging.getLogger(__name__)

SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
_OF_TOKENS = ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "forced_decoder_ids", "sequence_bias")
"""Settings of generation, beside `*_token_id`, that name tokens by their ids."""


def read_tokenizer(directory: Path, where: Path) -> Any | None:
    """Transformers' tokenizer of an export; None, and a warning, where there are files of one that it cannot read.

    Args:
        directory: the export being written, under a name that it loses when it is whole.
        where: the folder that its tokenizer was copied from, which messages name.
    """
    if not any(next(directory.glob(pattern), None) for pattern in VOCABULARIES):
        return None
    try:
        return load_tokenizer(directory)
    except DataError as error:
        log.warning(
            "%s; its files are carried on as they are, and token ids in the export are those of the source's "
            "config.json",
            _of_source(error, directory, where),
        )
        return None


def special_tokens(
    tokenizer: Any | None, directory: Path, said: Mapping[str, Any], *, vocab_size: int, decides: bool
) -> dict[str, Any]:
    """Token ids for config.json, by name; those of which nothing is known are None, or left out where `said` is.

    Args:
        tokenizer: that of `directory`, if it has one that can be read.
        said: what the config.json of the model before says, single ids or lists.
        decides: whether the tokenizer's own id wins over `said`: the model was trained with it, or gets it anew.
            Otherwise it fills what `said` leaves open.
    """
    ids = {name: said[name] for name in SPECIAL_TOKENS if name in said} if said else dict.fromkeys(SPECIAL_TOKENS)
    for name in SPECIAL_TOKENS:
        own = _own(tokenizer, directory, name)
        if own is not None and own >= vocab_size:
            log.warning(
                "the tokenizer's %s is %d, which the model has no row for (vocab_size %d): left out",
                name,
                own,
                vocab_size,
            )
        elif own is not None:
            ids[name] = _chosen(ids.get(name), own, decides=decides)
    return ids


def _own(tokenizer: Any | None, directory: Path, name: str) -> int | None:
    if tokenizer is None or name != "eos_token_id":
        return getattr(tokenizer, name, None)
    try:
        return end_of_document(directory, tokenizer)[0]
    except DataError:
        return None  # data cannot be made with it, but it may have been another's


def _chosen(before: Any, own: int, *, decides: bool) -> Any:
    """One id, or several: a chat model stops at several tokens, of which its tokenizer knows one."""
    if before is None or (decides and not (isinstance(before, list) and own in before)):
        return own
    return before


def write_generation(path: Path, special: Mapping[str, Any], *, decides: bool, foreign: bool) -> None:
    """Write generation_config.json at `path`: what stands there, with the token ids that it leaves open.

    Args:
        decides: generation must end at the `eos_token_id` of `special`, too.
        foreign: what stands there came with another tokenizer: its token ids are not these tokens.
    """
    carried = read_json_object(path, ConversionError) if path.is_file() else {}
    own, ends = special.get("eos_token_id"), carried.get("eos_token_id")
    if foreign:
        named = [name for name, value in carried.items() if value and name in _OF_TOKENS]
        if named:
            log.warning("%s: %s are of another tokenizer and left out", GENERATION_FILE, ", ".join(named))
        carried = {n: value for n, value in carried.items() if not n.endswith("_token_id") and n not in _OF_TOKENS}
        if isinstance(ends, list) and own in ends:
            carried["eos_token_id"] = ends
    elif decides and isinstance(own, int) and ends is not None:
        several = ends if isinstance(ends, list) else [ends]
        carried["eos_token_id"] = ends if own in several else [*several, own]
    unsaid = {n: value for n, value in special.items() if value is not None and carried.get(n) is None}
    path.write_text(json.dumps({**carried, **unsaid}, indent=2) + "\n", encoding="utf-8")


def check_rows(tokenizer: Any, where: Path, vocab_size: int, *, refuse: bool) -> None:
    """Say which tokens of `tokenizer`, of the folder `where`, have no row in an embedding of `vocab_size`.

    Raises:
        ConversionError: `refuse` is set, and text may make such a token. Special tokens are only warned of.
    """
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special} | set(
        tokenizer.all_special_ids
    )
    beyond = sorted((i, token) for token, i in tokenizer.get_vocab().items() if i >= vocab_size)
    if not beyond:
        return
    number, token = next(((i, token) for i, token in beyond if i not in special), beyond[0])
    what = (
        f"{where}: {len(beyond)} tokens, such as {number} ({token!r}), lie beyond the model's vocab_size, {vocab_size}"
    )
    if refuse and number not in special:
        raise ConversionError(
            f"{what}: text with them would end in an error; pass --tokenizer DIR of the one that the model was trained "
            "with, or train with a larger model.vocab_size"
        )
    log.warning("%s, and must not be used", what)


def check_reading(before: Any, directory: Path, where: Path) -> None:
    """Warn where transformers reads the tokenizer of `where` otherwise, beside an export's config.json, than before."""
    try:
        after = load_tokenizer(directory)
    except DataError as error:
        log.warning("beside this model's config.json: %s", _of_source(error, directory, where))
        return
    for text in HARD_TEXTS:
        if before(text).input_ids != after(text).input_ids:
            log.warning(
                "%s: beside a model of this class transformers reads the tokenizer as %s, not as %s, and %r otherwise; "
                'set "tokenizer_class" in tokenizer_config.json',
                where,
                type(after).__name__,
                type(before).__name__,
                text[:40],
            )
            return


def _of_source(error: DataError, directory: Path, where: Path) -> str:
    """What `error` says of the tokenizer in `directory`, said of the folder that it was copied from."""
    return str(error).replace(str(directory), str(where))
