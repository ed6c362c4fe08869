"""Compares tokenizers of any kind on text of several languages."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_ext.data.prepare.corpus import corpus_files
from megatron_ext.data.prepare.documents import read_documents
from megatron_ext.data.tokenizer.fertility import Fertility, measure_tokenizer
from megatron_ext.data.tokenizer.fertility_report import consequence_lines, fertility_lines
from megatron_ext.data.tokenizer.reading import Tokenizer
from megatron_ext.data.tokenizer.sample import sample
from megatron_ext.errors import DataError
from megatron_ext.progress import counted


@dataclass(frozen=True)
class Compared:
    """Tokenizers side by side, by the names that tell their folders apart."""

    fertility: dict[str, dict[str, Fertility]]
    """Of each tokenizer, by language."""
    vocabulary_sizes: dict[str, int]
    text_bytes: dict[str, int]
    """Of the whole text of each language, of which a sample was measured."""

    def lines(self, hidden_size: int, *, tied: bool) -> list[str]:
        """Both tables: fertility, and what it means for the text and for a model of that width."""
        consequences = consequence_lines(self.fertility, self.vocabulary_sizes, self.text_bytes, hidden_size, tied=tied)
        return [*fertility_lines(self.fertility), "", *consequences]


def compare_tokenizers(
    directories: Sequence[str | Path],
    texts: Mapping[str, Sequence[str | Path]],
    *,
    names: Sequence[str] = (),
    text_key: str = "text",
    max_characters: int,
) -> Compared:
    """Measure the tokenizers of `directories` on `texts` of each language.

    Args:
        names: proper nouns to look for.
        max_characters: of each language that are measured; of more, an even sample of documents.

    Raises:
        DataError: there is no such tokenizer or text.
    """
    tokenizers = {name: Tokenizer(path) for name, path in zip(_names_of(directories), directories, strict=True)}
    files = {language: corpus_files(paths) for language, paths in texts.items()}
    fertility: dict[str, dict[str, Fertility]] = {name: {} for name in tokenizers}
    text_bytes = {}
    for language, of_language in files.items():
        documents = sample(
            counted(read_documents(of_language, text_key), "documents read"), max_characters=max_characters
        )
        if not documents.characters:
            raise DataError(f"{', '.join(map(str, texts[language]))}: has no text to measure {language} on")
        text_bytes[language] = documents.of_bytes
        for name, tokenizer in tokenizers.items():
            fertility[name][language] = measure_tokenizer(tokenizer, documents.texts, names)
    return Compared(fertility, {name: one.vocab_size for name, one in tokenizers.items()}, text_bytes)


def _names_of(directories: Sequence[str | Path]) -> list[str]:
    """The shortest ends of the paths that are all different."""
    paths = list(dict.fromkeys(Path(path).resolve() for path in directories))
    if len(paths) < len(directories):
        raise DataError("a tokenizer is given twice; give each once")
    for count in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-count:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    raise AssertionError("different paths have different names")
