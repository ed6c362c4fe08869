"""The prepared data that a run names, looked at before anything starts: there, whole, of its tokenizer, long enough."""

import contextlib
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_ext.config import DataSource, StagedSource
from megatron_ext.config.data import source_ids
from megatron_ext.data.dataset import check_dataset, check_dataset_sums, dataset_fingerprint
from megatron_ext.data.stream.chat import chat_size
from megatron_ext.data.stream.make_plan import SourceSize
from megatron_ext.data.stream.packing import Packs, packs_of
from megatron_ext.data.supervised import PIECES, Kind, require_kind
from megatron_ext.data.tokenizer import Tokenizer
from megatron_ext.errors import DataError, MegatronExtError, named
from megatron_ext.planning.amounts import size
from megatron_ext.training.planned import pack_length, size_of_source

_READ_AT_ONCE = 2 * 10**9
"""Bytes of data that are read before each start to compare their checksums: a second or two."""


class DataFiles:
    """Looks at the files of every source.

    Args:
        values: every valid value and section of the run's configuration, by name.
        tokenizer: that of the run, where it is right.
        faults: what is found is noted there.
    """

    def __init__(self, values: Mapping[str, Any], tokenizer: Tokenizer | None, faults: list[str]) -> None:
        self._values, self._tokenizer, self._faults = values, tokenizer, faults
        self._whole: dict[str, str] = {}
        """Sources whose files have their sizes, and the key of each."""
        self.sums = ""
        """How the files were compared with what was written."""
        self.packed: list[str] = []
        """What packing saves of each source, where documents are packed."""
        self.warnings: list[str] = []

    def look(self) -> dict[str, SourceSize] | None:
        """Size of each source that is trained on, by id; None where one is not as it must be."""
        before = len(self._faults)
        train = self._sources("train")
        staged = self._sources("sources")
        tokens = [self._look_at_source(f"data.train.{number}", source) for number, source in train.items()]
        tokens += [self._look_at_source(f"data.sources.{name}", source) for name, source in staged.items()]
        sizes = None
        # How much of a source there is depends on the task; where that is wrong, nothing true can be said of the plan.
        if len(self._faults) == before and self._tokenizer is not None and self._values.get("task") is not None:
            ids = [*source_ids(list(train.values())), *staged]
            paths = [source.path for source in (*train.values(), *staged.values())]
            packed_to = pack_length(
                self._values.get("data.pack_documents", False) or self._kind != "text",
                self._values.get("data.stages") or [],
                self._values.get("data.sequence_length", 0),
            )
            if packed_to is not None:
                packs = {
                    name: packs_of(path, packed_to, PIECES[self._kind]) for name, path in zip(ids, paths, strict=True)
                }
                self.packed = [f"{name}: {self._said(one)}" for name, one in packs.items()]
            sizes = {
                name: size_of_source(path, count, packed_to, PIECES[self._kind])
                for name, path, count in zip(ids, paths, tokens, strict=True)
            }
        if self._values.get("train.eval_interval") is not None:
            trained, blend = dict(self._whole), self._sources("validation")
            there = {n: self._look_at_source(f"data.validation.{n}", source) for n, source in blend.items()}
            self._note_trained_on(trained, blend)
            if len(self._faults) == before and self._kind == "text":
                self._note_repeated(blend, there)
        self._sum_data()
        return sizes

    @property
    def _kind(self) -> Kind:
        task = self._values.get("task")
        return "text" if task is None else task.reads

    def _said(self, packs: Packs) -> str:
        """What packing does to a source."""
        if self._kind == "text":
            return packs.saved()
        return packs.filled("pairs" if self._kind == "preference" else "samples")

    def _note_trained_on(self, trained: Mapping[str, str], blend: Mapping[str, DataSource]) -> None:
        """Warn of validation on what is trained on, be it a copy elsewhere.

        Args:
            trained: paths of datasets that are whole, and their keys.
        """
        keys = {dataset_fingerprint(path): key for path, key in trained.items()}
        for number, source in blend.items():
            path = source.path
            if path in self._whole and (key := keys.get(dataset_fingerprint(path))) is not None:
                self.warnings.append(
                    f"data.validation.{number}.path = {path} is trained on, as {key}: its loss says how well that text "
                    "is remembered; name the validation split of it (tools/preprocess.py --split)"
                )

    def _note_repeated(self, blend: Mapping[str, DataSource], there: Mapping[str, int]) -> None:
        """Warn of a validation set that is read over and over each time: its loss says no more than once would.

        Args:
            there: tokens of each source of the blend.
        """
        keys = ("train.eval_iters", "train.global_batch_size", "data.sequence_length")
        steps, batch, length = (self._values.get(key) for key in keys)
        if not (steps and batch and length and all(there.values())):
            return
        total = sum(source.weight for source in blend.values())
        for number, source in blend.items():
            samples, wanted = (there[number] - 1) // length, steps * batch * source.weight / total
            if wanted >= 2 * samples:
                self.warnings.append(
                    f"data.validation.{number}.path = {source.path}: its {there[number]:,} tokens are {samples:,} x "
                    f"{length:,}, and validation reads {wanted:,.0f} such samples of it: no more is known than from "
                    "reading it once; keep more text for it (tools/preprocess.py --split), or lower train.eval_iters"
                )

    def _sum_data(self) -> None:
        """Read the files of the data and compare their checksums, where that takes seconds."""
        total = sum(_data_bytes(path) for path in self._whole)
        if total > _READ_AT_ONCE:
            folders = sorted({str(Path(path).parent) for path in self._whole})
            self.sums = (
                f"files have their sizes; {size(total)} are too much to read at each start: "
                f"tools/verify_checkpoint.py {folders[0]} compares checksums{' of each folder' * (len(folders) > 1)}"
            )
            return
        for path, key in self._whole.items():
            with collecting(self._faults, f"{key}.path", path):
                check_dataset_sums(path)
        if self._whole:
            self.sums = "files have their sizes and checksums"

    def _sources(self, blend: str) -> dict[str, Any]:
        """The sources of a blend by number, or id; of one with faults, those that have none."""
        key = f"data.{blend}"
        if (whole := self._values.get(key)) is not None:
            return dict(whole) if isinstance(whole, dict) else {str(n): source for n, source in enumerate(whole)}
        below = ((name.removeprefix(f"{key}."), value) for name, value in self._values.items() if name.startswith(key))
        return {name: value for name, value in below if isinstance(value, DataSource | StagedSource)}

    def _look_at_source(self, key: str, source: DataSource | StagedSource) -> int:
        """Tokens of a source, once its faults are noted."""
        with collecting(self._faults, f"{key}.path", source.path):
            missing = [suffix for suffix in (".bin", ".idx") if not Path(source.path + suffix).is_file()]
            if missing and Path(source.path).is_dir():
                raise DataError("is a folder; name a split in it, such as train")
            if missing:
                what = "is not there" if len(missing) == 2 else f"has no {missing[0]}"
                raise DataError(f"{what}; prepare it with tools/preprocess.py")
            if self._tokenizer is None:
                return 0
            length = self._values.get("data.sequence_length")
            if self._kind != "text":
                longest = pack_length(True, self._values.get("data.stages") or [], length or sys.maxsize)
                size = chat_size(source.path, self._tokenizer, longest or sys.maxsize, kind=self._kind)
                self._whole[source.path] = key
                return size.tokens
            tokens = check_dataset(source.path, self._tokenizer).tokens
            if self._values.get("task") is not None:  # otherwise something is wrong with that, which is said
                require_kind(source.path, "text", "task.kind = pretrain")
            self._whole[source.path] = key
            if length is not None and tokens <= length:
                raise DataError(
                    f"its {tokens:,} tokens are not one sample of data.sequence_length = {length}; lower that, or "
                    "prepare more text"
                )
            return tokens
        return 0


def _data_bytes(path: str) -> int:
    files = [Path(f"{path}.{ending}") for ending in ("bin", "idx", "mask", "weights")]
    return sum(file.stat().st_size for file in files if file.is_file())


@contextlib.contextmanager
def collecting(faults: list[str], subject: str = "", path: str = "") -> Iterator[None]:
    """Turn an error inside into a fault beside others, of `subject`, whose value is `path`, if those are given."""
    try:
        yield
    except MegatronExtError as error:
        text = str(error).replace("\n", "\n  ")
        if path:
            subject = f"{subject} = {named(path)}"
            text = text.removeprefix(f"{Path(path)}: ")  # it is said already
        faults.append(f"{subject}: {text}" if subject else text)
