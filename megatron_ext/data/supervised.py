"""Prepared chat data on disk: token files of a usual dataset, and beside them which tokens are trained on.

train.bin, train.idx   samples, in megatron-core's format; of pairs the chosen and the rejected answer in turn
train.mask             a bit for each token, whether it counts as a label; the first token of a sample never does
train.weights          a float32 for each sample, where a row has a weight other than 1
tokenizer/             the tokenizer with the chat template, and the tokens that end answers for generation
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from megatron_ext.checkpoint.tokenizer_files import GENERATION_FILE, SETTINGS_FILE
from megatron_ext.data.dataset import DATASET_FILE, PREPARE_AGAIN, check_dataset
from megatron_ext.data.indexed import read_index
from megatron_ext.data.tokenizer import Tokenizer
from megatron_ext.errors import DataError
from megatron_ext.files import read_json_object
from megatron_ext.foreign import reading

Kind = Literal["text", "chat", "preference"]
PREPARED_BY = {
    "text": "tools/preprocess.py",
    "chat": "tools/preprocess.py --chat",
    "preference": "tools/preprocess.py --preference",
}
READ_BY = {"text": "task.kind = pretrain", "chat": "task.kind = sft", "preference": "task.kind = preference"}
PIECES: dict[Kind, int] = {"text": 1, "chat": 1, "preference": 2}
"""How many samples in a row belong together: of a pair the chosen and the rejected answer."""
TOKENIZER_FOLDER, TEMPLATE_FILE = "tokenizer", "chat_template.jinja"


@dataclass(frozen=True)
class SupervisedSummary:
    """One split of prepared chat data."""

    samples: int
    """Sequences: of pairs twice as many."""
    tokens: int
    supervised: int
    """Tokens that count as labels."""
    longest: int
    """Tokens of the longest sample."""
    has_weights: bool


def kind_of_data(prefix: str | Path) -> Kind:
    """What the dataset at `prefix` was prepared as.

    Raises:
        DataError: its description cannot be read.
    """
    path = Path(prefix).parent / DATASET_FILE
    kind: Kind = read_json_object(path, DataError).get("kind", "text")
    return kind


def require_kind(prefix: str | Path, kind: Kind, reader: str) -> None:
    """Raise DataError where the dataset at `prefix` is not what `reader` reads."""
    found = kind_of_data(prefix)
    if found != kind:
        raise DataError(f"{prefix}: {reader} reads data of {PREPARED_BY[kind]}, and this is of {PREPARED_BY[found]}")


def check_supervised(prefix: str | Path, tokenizer: Tokenizer, kind: Kind) -> SupervisedSummary:
    """Check that the chat data at `prefix` is whole and was made with `tokenizer`, and return its sizes.

    Raises:
        DataError: says what does not match.
    """
    prefix = Path(prefix)
    counts = check_dataset(prefix, tokenizer)
    require_kind(prefix, kind, READ_BY[kind])
    description_file = prefix.parent / DATASET_FILE
    description = read_json_object(description_file, DataError)
    with reading(description_file, DataError, kind="what tools/preprocess.py writes", advice=PREPARE_AGAIN):
        said, template = description["splits"][prefix.name], str(description["chat_template"])
        ends = [int(number) for number in said["ends"]]
        found = SupervisedSummary(
            counts.documents, counts.tokens, int(said["supervised"]), int(said["longest"]), bool(said["has_weights"])
        )
    sizes = {mask_file(prefix): -(-found.tokens // 8)}
    if found.has_weights:
        sizes[weights_file(prefix)] = 4 * found.samples
    for path, size in sizes.items():
        if not path.is_file() or path.stat().st_size != size:
            raise DataError(
                f"{path}: is missing, or has not the {size} bytes that {DATASET_FILE} says; {PREPARE_AGAIN}"
            )
    _check_template(prefix, template, ends, tokenizer)
    return found


def _check_template(prefix: Path, fingerprint: str, ends: Sequence[int], tokenizer: Tokenizer) -> None:
    """Raise DataError where a model trained on the data and exported with `tokenizer` would be asked otherwise."""
    way_out = f"give data.tokenizer = {prefix.parent / TOKENIZER_FOLDER}"
    if (template := template_of(tokenizer.directory)) is None or fingerprint_of(template) != fingerprint:
        raise DataError(
            f"{prefix}: {tokenizer.directory} has {'no' if template is None else 'another'} chat template; {way_out}, "
            "which has the one that the data was made with"
        )
    path = tokenizer.directory / GENERATION_FILE
    said = read_json_object(path, DataError).get("eos_token_id", []) if path.is_file() else []
    stops = {tokenizer.eod, *(said if isinstance(said, list) else [said])}
    if missing := [number for number in ends if number not in stops]:
        spelt = {number: token for token, number in tokenizer.vocabulary.items()}[missing[0]]
        raise DataError(
            f"{prefix}: its answers end with {spelt!r}, where generation by {tokenizer.directory} would not stop: "
            f"{way_out}, or name the token in eos_token_id of its {GENERATION_FILE}"
        )


def template_of(directory: Path) -> str | None:
    """The chat template of the tokenizer in `directory`, as transformers would take it; None without one."""
    if (directory / TEMPLATE_FILE).is_file():
        with reading(directory / TEMPLATE_FILE, DataError, kind="a chat template"):
            return (directory / TEMPLATE_FILE).read_text(encoding="utf-8")
    settings = directory / SETTINGS_FILE
    template = read_json_object(settings, DataError).get("chat_template") if settings.is_file() else None
    if isinstance(template, list):  # several by name
        template = {one.get("name"): one.get("template") for one in template if isinstance(one, dict)}.get("default")
    return template if isinstance(template, str) else None


def fingerprint_of(template: str) -> str:
    """Changes with the text of a chat template."""
    return hashlib.sha256(template.encode()).hexdigest()[:16]


def number_of_pairs(prefix: str | Path) -> int:
    """Pairs of the dataset at `prefix`."""
    return len(read_index(Path(f"{prefix}.idx"))[1]) // PIECES["preference"]


def mask_file(prefix: str | Path) -> Path:
    """Where the mask of the dataset at `prefix` stands."""
    return Path(f"{prefix}.mask")


def weights_file(prefix: str | Path) -> Path:
    """Where the weights of its samples stand, if there are any."""
    return Path(f"{prefix}.weights")


class Supervised:
    """The samples of prepared chat data, mapped from their files. It can be sent to other processes.

    Raises:
        DataError: a file is missing or cut.
    """

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = Path(prefix)
        self._open()

    def _open(self) -> None:
        prefix = self.prefix
        dtype, self.lengths = read_index(Path(f"{prefix}.idx"))
        self._ends = np.cumsum(self.lengths, dtype=np.int64)
        weights = weights_file(prefix)
        try:
            self._ids = np.memmap(f"{prefix}.bin", dtype, "r")
            self._mask = np.memmap(mask_file(prefix), np.uint8, "r")
            self._weights = np.memmap(weights, np.float32, "r") if weights.is_file() else None
        except (OSError, ValueError) as error:
            raise DataError(f"{prefix}: cannot be read ({error}); {PREPARE_AGAIN}") from error
        if len(self._ids) != self._ends[-1] or len(self._mask) != -(-len(self._ids) // 8):
            raise DataError(f"{prefix}: its files are of different length: damaged or cut; {PREPARE_AGAIN}")

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def num_tokens(self) -> int:
        """Tokens of all samples."""
        return int(self._ends[-1])

    def number_at(self, token: int) -> int:
        """The number of the sample that `token`, counted over all of them, is of."""
        return int(np.searchsorted(self._ends, token, side="right"))

    def sample(self, number: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], float]:
        """Token ids (int64), which of them count as labels (bool), and the weight of a sample."""
        end = int(self._ends[number])
        start = end - int(self.lengths[number])
        bits = np.unpackbits(self._mask[start // 8 : -(-end // 8)], bitorder="little")
        counts = bits[start % 8 : start % 8 + end - start].astype(bool)
        weight = 1.0 if self._weights is None else float(self._weights[number])
        return self._ids[start:end].astype(np.int64), counts, weight

    def __getstate__(self) -> dict[str, Any]:
        return {"prefix": self.prefix}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.prefix = state["prefix"]
        self._open()
