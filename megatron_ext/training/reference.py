"""What the reference of preference optimisation says of every pair: computed once, and kept beside the prepared pairs.

<prefix>.reference-<weights>.safetensors holds `log_probs` [pairs, 2] in fp32, of the chosen and the rejected answer of
each, and in its metadata what they follow from. Other weights have another file, so that runs with several references
may share their pairs.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from megatron_ext.checkpoint.collective import gathered, on_first_rank, together
from megatron_ext.config import RunConfig, to_mapping
from megatron_ext.config.model_fields import TRAINING_FIELDS
from megatron_ext.data.dataset import dataset_fingerprint
from megatron_ext.data.indexed import sync
from megatron_ext.data.stream.batches import MicroBatch, collate, sample_indices
from megatron_ext.data.stream.packing import packs_of
from megatron_ext.data.stream.pairs import PackedPairs
from megatron_ext.data.stream.plan import Place
from megatron_ext.data.supervised import PIECES, number_of_pairs
from megatron_ext.errors import CheckpointError
from megatron_ext.files import UNFINISHED, writing
from megatron_ext.progress import counted
from megatron_ext.training.data import pairs_of_run
from megatron_ext.training.frozen_base import fingerprint_of_weights
from megatron_ext.training.planned import pack_length
from megatron_ext.training.tasks.preference import Preference, answer_log_probs

if TYPE_CHECKING:
    from megatron_ext.training.session import Session

_TENSOR, _KEY = "log_probs", "reference"
_WAY_OUT = "move it away, and a new run from these weights computes it again"


class StoredReference:
    """The reference of a run: the weights that it began from, by what they say of its pairs."""

    def __init__(self, run: RunConfig) -> None:
        self._run = run
        self._weights: str | None = None
        """Fingerprint of the reference's weights, once it is known."""
        self._continues = False

    def record(self) -> dict[str, Any]:
        """What a checkpoint says of it."""
        return {_KEY: {"weights": self._weights}}

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Go on with the reference of a checkpoint."""
        self._weights, self._continues = str(saved[_KEY]["weights"]), True

    def table(self, session: "Session") -> Tensor:
        """The log-probabilities of all pairs that the run reads [pairs, 2], on its device. Every rank must call this.

        Those that are not there are computed, by a new run alone: another has other weights by now.

        Raises:
            CheckpointError: they are of other data, model or sequence length, damaged, or those of another run.
        """
        if self._weights is None:
            shards = session.trainable.base_weights()
            self._weights = fingerprint_of_weights(shards, self._run, session.device)
        for prefix in pairs_of_run(self._run):
            path = reference_file(prefix, self._weights)
            if not all(gathered(path.is_file())):
                if self._continues:
                    raise CheckpointError(
                        f"{path}: is not there: what the reference of this run said of its pairs. Take it from a copy, "
                        "or have another run compute it, from the same checkpoint.initialize_from with another "
                        "checkpoint.directory and train.stop_at_iteration = 1; this one goes on then"
                    )
                self._compute(session, prefix, path)
        found: list[Tensor] = []
        together(lambda: found.extend(self._read()), "the reference of the pairs cannot be used")
        return torch.cat(found).to(session.device)

    def _read(self) -> Iterator[Tensor]:
        for prefix in pairs_of_run(self._run):
            assert self._weights is not None
            yield _read(reference_file(prefix, self._weights), self._follows_from(prefix), number_of_pairs(prefix))

    def _follows_from(self, prefix: str) -> dict[str, str]:
        """All that the log-probabilities of the pairs at `prefix` follow from."""
        run = self._run
        assert self._weights is not None
        model = {name: value for name, value in to_mapping(run.model).items() if name not in TRAINING_FIELDS}
        described = json.dumps(model, sort_keys=True)
        return {
            "weights": self._weights,
            "model": hashlib.sha256(described.encode()).hexdigest()[:16],
            "data": dataset_fingerprint(prefix),
            "data.sequence_length": str(_length(run)),
            "precision.kind": run.precision.kind,
        }

    def _compute(self, session: "Session", prefix: str, path: Path) -> None:
        """Have the weights as they are say what they say of the pairs at `prefix`."""
        groups, pairs = session.groups, number_of_pairs(prefix)
        table = torch.zeros(pairs, 2, device=session.device)
        task = session.task
        assert isinstance(task, Preference)
        batches, total = _batches(self._run, prefix, groups.dp.rank(), groups.dp.size())
        if dist.get_rank() == 0:
            batches = counted(batches, f"of {total:,} batches of {pairs:,} pairs read by the reference, {prefix}")
        for batch in batches:
            share = [micro.to(session.device).context_share(groups.cp.rank(), groups.cp.size()) for micro in batch]
            rows, length = batch[0].tokens.shape
            sums = answer_log_probs(task, session.wrapped, share, rows=rows, length=length)
            if groups.tp.rank() == 0 and groups.cp.rank() == 0:
                for micro, sums_BP2 in zip(share, sums, strict=bool(sums)):
                    assert micro.pairs is not None
                    is_pair = micro.pairs.is_pair_BP & (micro.sources == 0)[:, None]
                    table[micro.pairs.numbers[is_pair]] = sums_BP2[is_pair]
        dist.all_reduce(table, group=groups.world)
        on_first_rank(lambda: _write(path, table.cpu(), self._follows_from(prefix)))


def reference_file(prefix: str | Path, weights: str) -> Path:
    """Where that of the pairs at `prefix` by `weights` stands."""
    return Path(f"{prefix}.reference-{weights.replace(':', '-')}.safetensors")


def _length(run: RunConfig) -> int:
    return pack_length(True, run.data.stages, run.data.sequence_length) or run.data.sequence_length


def _batches(run: RunConfig, prefix: str, dp_rank: int, dp_size: int) -> tuple[Iterator[list[MicroBatch]], int]:
    """This rank's micro-batches of every pack at `prefix`, in rows as training has them, and how many batches."""
    length, train = _length(run), run.train
    packs = packs_of(prefix, length, PIECES["preference"])
    file = PackedPairs(prefix, packs, 0)

    def sample(number: int) -> dict[str, Any]:
        # The last batch is filled up with packs that count for nothing; their source says so.
        unit = min(number, len(packs) - 1)
        return {**file.pack(Place("", unit, unit, 0, length)), "seed": 0, "source": int(number >= len(packs))}

    starts = range(0, len(packs), train.global_batch_size)
    each = train.global_batch_size // (train.micro_batch_size * dp_size)
    rows = (sample_indices(start, dp_rank, dp_size, train.micro_batch_size, each) for start in starts)
    return ([collate([sample(number) for number in row]) for row in batch] for batch in rows), len(starts)


def _write(path: Path, table: Tensor, follows_from: Mapping[str, str]) -> None:
    """Write the file whole: beside, and on the disk before it gets its name."""
    beside = path.with_name(f".{path.name}.{os.getpid()}{UNFINISHED}")
    beside.unlink(missing_ok=True)
    try:
        with writing(path):
            with open(beside, "xb") as file:
                file.write(save({_TENSOR: table}, dict(follows_from)))
                sync(file)
            beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def _read(path: Path, follows_from: Mapping[str, str], pairs: int) -> Tensor:
    """The table at `path`.

    Raises:
        CheckpointError: it is damaged, or follows from something else.
    """
    try:
        with safe_open(path, "pt") as file:
            said = file.metadata() or {}
            table: Tensor = file.get_tensor(_TENSOR)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); {_WAY_OUT}") from error
    if other := [name for name, value in follows_from.items() if said.get(name) != value]:
        lines = "\n".join(f"  {name}: {said.get(name)} there, {follows_from[name]} in this run" for name in other)
        raise CheckpointError(
            f"{path}: is what the reference said of something else:\n{lines}\nSet it back, or {_WAY_OUT}"
        )
    if table.shape != (pairs, 2) or not bool(table.isfinite().all()):
        raise CheckpointError(f"{path}: holds no log-probabilities of {pairs} pairs; {_WAY_OUT}")
    return table
