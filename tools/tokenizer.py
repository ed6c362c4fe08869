#!/usr/bin/env python
"""Make tokenizers: train one, merge those of several languages, add tokens, export, compare.

python tools/tokenizer.py train corpus.jsonl ... --output DIR --vocab-size 8192
python tools/tokenizer.py merge ja=tok-ja en=tok-en --output DIR --quota ja=43000,en=13000 --text ja=ja/ en=en/
python tools/tokenizer.py compare tok-a tok-b --text ja=ja/ en=en/ --plot fertility.png
python tools/tokenizer.py export tokenizer.model --output DIR
python tools/tokenizer.py extend MODEL MODEL-2 --tokens '<|im_start|>' '<|im_end|>' --special

train, merge and export write a directory that tools/preprocess.py takes (--tokenizer DIR), and training too
(data.tokenizer): the SentencePiece model beside a fast tokenizer for Hugging Face, written only once both were seen to
encode texts alike. The tokenizer of a published model needs neither: give its directory to tools/preprocess.py.
"""

import itertools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from megatron_ext.command import chosen_command, ending_on_sigterm, parse_command, prefer_huge_pages, run_command
from megatron_ext.config.base import PathName, config
from megatron_ext.errors import ConfigError, note_path
from megatron_ext.files import require_writable
from megatron_ext.model_io.options import ExtendOptions


@config
class TrainOptions:
    """Options of `train`."""

    inputs: list[PathName] = Field(min_length=1)
    """Text to train on: .jsonl, .json, .txt, these as .gz, or folders of them."""
    output: PathName
    """Directory to write: the SentencePiece model, and a Hugging Face fast tokenizer that encodes alike."""
    vocab_size: int = Field(default=32000, ge=300)
    """Tokens, including 256 bytes and 5 special ones."""
    model_type: Literal["unigram", "bpe"] = "unigram"
    """unigram: pieces have probabilities, so that models can be merged and names added. bpe: pieces are merged in
    order."""
    text_key: str = "text"
    """Where the text stands in a line of JSONL."""
    max_lines: int = Field(default=1_000_000, ge=1000)
    """Lines to train on; of more an even sample is taken."""
    max_characters: int = Field(default=200_000_000, ge=100_000, le=1_000_000_000)
    """Characters to train on, likewise. Training takes about 40 bytes of memory for each."""
    character_coverage: float = Field(default=0.9995, ge=0.98, le=1)
    """Share of the text's characters that get a token each; the rarer ones are written in bytes. For languages of many
    characters a lower one leaves more of a small vocabulary to words."""
    byte_fallback: bool = True
    """Write characters without a token in bytes. --no-byte-fallback: they are all one unknown token, and text with them
    does not come back."""
    split_digits: bool = True
    """Every digit is a token. --no-split-digits: numbers that are frequent are tokens too."""
    user_symbols: list[str] = Field(default_factory=list)
    """Tokens that are cut out of the text before anything else, such as <think> </think>. The newline is one always."""
    pretokenization_delimiter: str = ""
    """What marks word boundaries in the text to train on, such as ||||: no token goes across. The tokenizer itself
    knows nothing of it."""
    names: PathName | None = None
    """File of proper nouns, one a line, that are whole tokens (unigram only): they take the place of the least likely
    ones."""
    bad_lines: Literal["stop", "skip"] = "stop"
    """A line that cannot be read ends the command, or (skip) is counted and left out; the first are said."""
    force: bool = False
    """Replace an existing output."""


@config
class MergeOptions:
    """Options of `merge`."""

    models: list[str] = Field(min_length=2)
    """NAME=PATH of each language: a SentencePiece model, or a tokenizer's directory with one."""
    quota: str
    """Normal pieces of each language, as ja=43000,en=13000,hi=7000. One that an earlier language has brought already is
    not counted: the next likely one comes in its place."""
    text: list[str] = Field(min_length=1)
    """NAME=PATH of text of each language, in the proportions of the training mix; a name may come several times. One
    document in 20 is not counted, but measured on."""
    output: PathName
    """Directory to write."""
    scores: Literal["mixture", "em"] = "mixture"
    """mixture: a piece's probability is the sum over models, each weighted by its language's share of the mix. em:
    those, then counted anew on the mix, twice."""
    strip_spaces: list[str] = Field(default_factory=list)
    """Names of languages whose training text was segmented by spaces: they go from the front of their pieces."""
    names: PathName | None = None
    """File of proper nouns, one a line, that are whole tokens."""
    text_key: str = "text"
    """Where the text stands in a line of JSONL."""
    max_lines: int = Field(default=1_000_000, ge=1000)
    """Lines of each language to count on; of more an even sample is taken."""
    max_characters: int = Field(default=200_000_000, ge=100_000)
    """Characters of each language, likewise."""
    joint: bool = False
    """Train one model of the same size on all the text as well, and print how it does beside the merged one."""
    force: bool = False
    """Replace an existing output."""


@config
class CompareOptions:
    """Options of `compare`."""

    tokenizers: list[PathName] = Field(min_length=1)
    """Directories of tokenizers, of any kind. Changes are given from the first."""
    text: list[str] = Field(min_length=1)
    """NAME=PATH of text of each language, best such as none of them was trained on; a name may come several times."""
    names: PathName | None = None
    """File of proper nouns, one a line: how many of those in the text are within one token."""
    hidden_size: int = Field(default=4096, ge=1)
    """Of the model, for the parameters of its embedding and output layer."""
    tied: bool = False
    """The output layer has the embedding's weights."""
    plot: PathName | None = None
    """File to draw the figures to (.png, .svg, .pdf)."""
    text_key: str = "text"
    """Where the text stands in a line of JSONL."""
    max_characters: int = Field(default=5_000_000, ge=1000)
    """Characters of each language to measure; of more an even sample of documents is taken."""


@config
class ExportOptions:
    """Options of `export`."""

    model: PathName
    """SentencePiece model file, or the folder of a tokenizer with one."""
    output: PathName
    """Directory to write."""
    text: list[PathName] = Field(default_factory=list)
    """More text to prove it on (as for train): the first 500 documents."""
    force: bool = False
    """Replace an existing output."""


_PROOF_TEXTS = 500
_PLOTS = (".png", ".svg", ".pdf")


def train(argv: Sequence[str]) -> None:
    """Train a tokenizer."""
    o = parse_command(TrainOptions, __doc__, positional=["inputs"], argv=argv)
    from megatron_ext.data.tokenizer import Training, read_names, train_tokenizer

    how = Training(
        model_type=o.model_type,
        byte_fallback=o.byte_fallback,
        split_digits=o.split_digits,
        user_symbols=o.user_symbols,
        pretokenization_delimiter=o.pretokenization_delimiter,
        names=read_names(o.names) if o.names else (),
        character_coverage=o.character_coverage,
        max_lines=o.max_lines,
        max_characters=o.max_characters,
        threads=os.cpu_count() or 1,
    )
    with ending_on_sigterm():
        tokenizer = train_tokenizer(
            o.inputs, o.output, o.vocab_size, how, text_key=o.text_key, bad_lines=o.bad_lines, force=o.force
        )
    _say(tokenizer)


def merge(argv: Sequence[str]) -> None:
    """Merge the models of several languages."""
    o = parse_command(MergeOptions, __doc__, positional=["models"], argv=argv)
    models, texts = _by_name("models", o.models), _by_name("text", o.text)
    quotas = _quotas(o.quota)
    for option, names in (("quota", list(quotas)), ("text", list(texts)), ("strip_spaces", o.strip_spaces)):
        _same_names(option, names, list(models), all_of_them=option != "strip_spaces")
    if twice := [name for name, paths in models.items() if len(paths) > 1]:
        raise ConfigError(f"models = {twice[0]}={models[twice[0]][1]}: {twice[0]!r} is named twice")
    from megatron_ext.data.tokenizer import Language, fertility_lines, merge_tokenizers, read_names

    languages = {
        name: Language(Path(path), quotas[name], texts[name], name in o.strip_spaces)
        for name, (path,) in models.items()
    }
    with ending_on_sigterm():
        made = merge_tokenizers(
            languages,
            o.output,
            scores=o.scores,
            names=read_names(o.names) if o.names else (),
            text_key=o.text_key,
            max_lines=o.max_lines,
            max_characters=o.max_characters,
            joint=o.joint,
            force=o.force,
        )
    for name, share in made.merged.shares.items():
        print(f"{name}: {made.merged.brought[name]:,} pieces, {share:.1%} of the tokens of the mix")
    print(*fertility_lines(made.fertility), sep="\n")
    _say(made.tokenizer)


def compare(argv: Sequence[str]) -> None:
    """Measure tokenizers side by side."""
    o = parse_command(CompareOptions, __doc__, positional=["tokenizers"], argv=argv)
    texts = _by_name("text", o.text)
    if o.plot is not None:
        if Path(o.plot).suffix not in _PLOTS:
            raise ConfigError(f"plot = {o.plot}: expected a name that ends in {', '.join(_PLOTS)}")
        require_writable(o.plot)
    from megatron_ext.data.tokenizer import compare_tokenizers, read_names, write_plot

    compared = compare_tokenizers(
        o.tokenizers,
        texts,
        names=read_names(o.names) if o.names else (),
        text_key=o.text_key,
        max_characters=o.max_characters,
    )
    print(*compared.lines(o.hidden_size, tied=o.tied), sep="\n")
    if o.plot is not None:
        write_plot(compared.fertility, o.plot)
        print(f"plot: {o.plot}")


def export(argv: Sequence[str]) -> None:
    """Export a SentencePiece model for Hugging Face."""
    o = parse_command(ExportOptions, __doc__, positional=["model"], argv=argv)
    from megatron_ext.data.prepare.corpus import corpus_files
    from megatron_ext.data.prepare.documents import read_documents
    from megatron_ext.data.tokenizer import read_model, write_tokenizer

    model = read_model(o.model)
    texts = itertools.islice(read_documents(corpus_files(o.text)), _PROOF_TEXTS) if o.text else []
    with ending_on_sigterm():
        _say(write_tokenizer(model, o.output, texts, force=o.force, source=o.model))


def extend(argv: Sequence[str]) -> None:
    """Add tokens to a model and its tokenizer."""
    o = parse_command(ExtendOptions, __doc__, positional=["source", "target"], argv=argv)
    prefer_huge_pages()
    from megatron_ext.model_io.extend import extend as extend_model
    from megatron_ext.progress import byte_progress

    with ending_on_sigterm(), byte_progress("extending") as progress:
        made = extend_model(o, progress)
    first, last = min(made.added.ids.values()), max(made.added.ids.values())
    print(f"{o.target}: {len(made.added.ids)} tokens more, with the ids {first} to {last}")
    if not o.special:
        print("text is cut at them before anything else: each is read wherever it stands, also within a longer word")
    print(*made.lines, sep="\n", end="\n" if made.lines else "")
    if made.model is not None:
        print(f"model.vocab_size is {made.model.vocab_size}; a new row is the mean of its text's old ones: train them")
    if made.recipe is not None:
        print(f"training configuration: {made.recipe}")


COMMANDS: dict[str, Any] = {
    "train": (train, TrainOptions),
    "merge": (merge, MergeOptions),
    "compare": (compare, CompareOptions),
    "export": (export, ExportOptions),
    "extend": (extend, ExtendOptions),
}


def main() -> None:
    """Parse the command line and do what its first word says."""
    options = {name: taken for name, (_, taken) in COMMANDS.items()}
    action, arguments = chosen_command("tools/tokenizer.py", __doc__, options)
    COMMANDS[action][0](arguments)


def _say(tokenizer: Any) -> None:
    print(f"{tokenizer.directory}: {tokenizer.vocab_size} tokens, end of document is {tokenizer.eod}")


def _by_name(option: str, values: Sequence[str]) -> dict[str, list[str]]:
    """The paths of `NAME=PATH`, by name."""
    found: dict[str, list[str]] = {}
    for value in values:
        name, separator, path = value.partition("=")
        if not (name and separator and path):
            raise ConfigError(f"{option} = {value!r}: expected NAME=PATH, such as ja={path or value}")
        note_path(path)
        found.setdefault(name, []).append(path)
    return found


def _quotas(text: str) -> dict[str, int]:
    quotas: dict[str, int] = {}
    for one in text.split(","):
        name, _, count = one.strip().partition("=")
        if not name or not count.isdecimal() or int(count) < 1 or name in quotas:
            raise ConfigError(f"quota = {text!r}: expected a number of pieces for each name, as ja=43000,en=13000")
        quotas[name] = int(count)
    return quotas


def _same_names(option: str, names: Sequence[str], known: Sequence[str], *, all_of_them: bool) -> None:
    """Raise ConfigError where an option names a language that no model has, or leaves one out."""
    if unknown := [name for name in names if name not in known]:
        raise ConfigError(f"{option} names {', '.join(unknown)}, but the models are {', '.join(known)}")
    if all_of_them and (missing := [name for name in known if name not in names]):
        raise ConfigError(f"{option}: has nothing for {', '.join(missing)}; each model needs one")


if __name__ == "__main__":
    run_command(main)
