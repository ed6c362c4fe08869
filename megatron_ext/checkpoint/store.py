"""Training checkpoints: saved so that an interrupted save never looks complete, found, checked and loaded.

`<directory>/iter_0000100/` holds the tensors in `torch_dist` format, `run.yaml` (the resolved configuration),
`state.json` (step, data position, W&B run), `rng.pt` (random states), `tokenizer/` and `manifest.json` (size and
checksum of each). It is written beside its final name, the manifest last, and renamed when everything is on disk, so a
directory with such a name is complete.

Stock megatron-core loads it with `StrictHandling.LOG_ALL` (Megatron-LM: `--dist-ckpt-strictness log_all`): its layers
also ask for an `_extra_state`, Transformer Engine's fp8 bookkeeping, which is no part of the model and not stored here.
"""

import fnmatch
import io
import json
import logging
import os
import re
import shutil
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist

from megatron_ext.checkpoint.run_file import RUN_FILE as RUN_FILE
from megatron_ext.checkpoint.run_file import read_run as read_run
from megatron_ext.checkpoint.run_file import write_run
from megatron_ext.checkpoint.shards import Shape, TensorShard
from megatron_ext.checkpoint.tokenizer_files import copy_tokenizer
from megatron_ext.checkpoint.torch_dist import (
    METADATA_FILE,
    ChunkRecord,
    TorchDistReader,
    TorchDistWriter,
    write_metadata,
)
from megatron_ext.errors import CheckpointError, named
from megatron_ext.files import UNFINISHED, read_json_object, write_bytes, write_text
from megatron_ext.foreign import reading
from megatron_ext.manifest import (
    MANIFEST_FILE,
    FileSum,
    check_manifest,
    manifest_faults,
    raise_faults,
    read_manifest,
    write_manifest,
)

log = logging.getLogger(__name__)

TRACKER_FILE = "latest_checkpointed_iteration.txt"
STATE_FILE, RNG_FILE, TOKENIZER_FOLDER = "state.json", "rng.pt", "tokenizer"
CHECKPOINT_CONTENTS = (
    METADATA_FILE,
    "*.distcp",
    "common.pt",
    "metadata.json",
    RUN_FILE,
    STATE_FILE,
    RNG_FILE,
    TOKENIZER_FOLDER,
    MANIFEST_FILE,
)
"""What stands in a complete checkpoint."""
_COMPLETE = re.compile(r"iter_(\d{7,})")


@dataclass(frozen=True)
class TrainingState:
    """Where a run stands."""

    iteration: int = 0
    """Optimizer steps done."""
    consumed_samples: int = 0
    """Sequences consumed: the position in the data."""
    optimizer_steps: int = 0
    """Steps Adam has counted; fewer than `iteration` where the optimizer was started afresh."""
    data: tuple[str, ...] = ()
    """Fingerprints of the training sources, in which `consumed_samples` is a position."""
    wandb_run_id: str | None = None
    """The W&B run to continue."""


def checkpoint_name(iteration: int) -> str:
    """Directory name of a checkpoint."""
    return f"iter_{iteration:07d}"


def find_checkpoint(path: str | Path) -> Path | None:
    """The checkpoint at `path`, or the newest one inside it; None if there never was one.

    Raises:
        CheckpointError: there has been one that is not complete any more. Nothing older is taken in its stead.
    """
    path = Path(path)
    if is_checkpoint(path):
        _require_complete(path, None)
        return path
    found = _checkpoints(path)
    if found:
        _require_complete(found[-1], next((older for older in reversed(found[:-1]) if not faults_of(older)), None))
    noted = _noted_iteration(path)
    if noted is not None and not found:
        raise CheckpointError(
            f"{path}: {TRACKER_FILE} says {noted}, but no checkpoint is here (a directory iter_* with "
            f"{METADATA_FILE}). Bring it back, or start anew in another directory or after removing {TRACKER_FILE}"
        )
    if found and noted is not None and noted != str(_iteration(found[-1])) and _speaks():
        log.warning("%s: %s says %s, but the newest checkpoint is %s", path, TRACKER_FILE, noted, found[-1].name)
    return found[-1] if found else None


def require_checkpoint(path: str | Path) -> Path:
    """`find_checkpoint`, raising CheckpointError where there is none."""
    found = find_checkpoint(path)
    if found is None:
        raise CheckpointError(
            f"{named(path)}: no complete Megatron checkpoint (a directory iter_* with {METADATA_FILE}) here"
        )
    return found


def is_checkpoint(path: Path) -> bool:
    """Whether the directory `path` is, or was meant to be, one checkpoint."""
    return (path / METADATA_FILE).is_file() or (path.is_dir() and any(path.glob("*.distcp")))


def faults_of(checkpoint: Path) -> list[str]:
    """What makes `checkpoint` one that cannot be gone on from; empty where nothing does."""
    faults = []
    if not (checkpoint / METADATA_FILE).is_file():
        faults.append(
            f"{METADATA_FILE} is missing (a hidden file, which `cp DIR/*` leaves behind: copy with `cp -a DIR`)"
        )
    elif not any(checkpoint.glob("*.distcp")):
        faults.append("*.distcp, the tensors, are missing")
    return faults


def complete_checkpoints(directory: Path) -> list[Path]:
    """The complete checkpoints in a directory, oldest first."""
    return [checkpoint for checkpoint in _checkpoints(directory) if not faults_of(checkpoint)]


def newest_checkpoints(directory: Path, count: int) -> list[Path]:
    """The newest `count` checkpoints in a directory, or as many as there are, oldest first.

    Raises:
        CheckpointError: one of them is damaged. None is passed over for an older one.
    """
    found = _checkpoints(directory)[-count:]
    for checkpoint in found:
        if faults := faults_of(checkpoint):
            way_out = "bring it back whole, or move it away to do without it"
            raise CheckpointError(f"{checkpoint} is not complete: {'; '.join(faults)}. To go on, {way_out}")
    return found


def _checkpoints(directory: Path) -> list[Path]:
    """Every directory with the name of a complete checkpoint, oldest first."""
    if not directory.is_dir():
        return []
    return sorted((entry for entry in directory.iterdir() if _COMPLETE.fullmatch(entry.name)), key=_iteration)


def _speaks() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def _iteration(checkpoint: Path) -> int:
    match = _COMPLETE.fullmatch(checkpoint.name)
    return int(match[1]) if match else 0


def _noted_iteration(directory: Path) -> str | None:
    """What the tracker says is the newest checkpoint; None where there is no tracker."""
    try:
        return (directory / TRACKER_FILE).read_text(errors="replace").strip()[:80]
    except (FileNotFoundError, NotADirectoryError):
        return None


def _require_complete(checkpoint: Path, before: Path | None) -> None:
    """Raise CheckpointError where `checkpoint` is damaged, saying how to go on from the one `before` it."""
    if not (faults := faults_of(checkpoint)):
        return
    if before is not None:
        way_out = f"To go on from {before.name} instead, move {checkpoint.name} away"
    else:
        way_out = "There is no complete one before it: bring it back whole, or start anew in another directory"
    raise CheckpointError(f"{checkpoint} is not complete: {'; '.join(faults)}. {way_out}")


def require_whole(checkpoint: Path, *, checksums: bool = False) -> None:
    """Raise CheckpointError where files of `checkpoint` are not what its manifest says: missing, cut or changed.

    Sizes are those of all files; checksums, unless asked for, those of the small ones. Without a manifest it passes.
    """
    advice = _way_out(checkpoint)
    check_manifest(checkpoint, CheckpointError, checksums=checksums, advice=advice)
    if not checksums:
        small = [path.name for path in checkpoint.iterdir() if path.suffix != ".distcp"]
        small.append(f"{TOKENIZER_FOLDER}/*")
        check_manifest(checkpoint, CheckpointError, checksums=True, only=small, advice=advice)


def require_whole_together(checkpoint: Path) -> None:
    """Raise CheckpointError where files of a checkpoint of either kind are not what its manifest says, by checksum.

    In a run every rank must call this; each reads its share of the files.
    """
    if not dist.is_initialized():
        require_whole(checkpoint, checksums=True)
        return
    manifest = read_manifest(checkpoint, CheckpointError) or {}
    names = sorted(manifest, key=lambda name: (manifest[name].bytes, name))[dist.get_rank() :: dist.get_world_size()]
    faults = list(manifest_faults(checkpoint, {name: manifest[name] for name in names}, checksums=True))
    raise_faults(
        checkpoint, CheckpointError, [fault for part in _gather(faults) for fault in part], _way_out(checkpoint)
    )


def _way_out(checkpoint: Path) -> str:
    """What to do where `checkpoint` is damaged."""
    older = [entry for entry in complete_checkpoints(checkpoint.parent) if entry.name < checkpoint.name]
    if not older:
        return "take them from a copy"
    return (
        f"take them from a copy, or go on from {older[-1].name}, the checkpoint before: "
        f"mv {checkpoint} {checkpoint}.damaged, and start again"
    )


def read_state(checkpoint: Path) -> TrainingState:
    """The training state saved in `checkpoint`."""
    path = checkpoint / STATE_FILE
    check_manifest(checkpoint, CheckpointError, only=(STATE_FILE,), checksums=True, advice=_way_out(checkpoint))
    with reading(path, CheckpointError, advice="it is not a training state of this framework"):
        raw = read_json_object(path, CheckpointError)
        state = TrainingState(**{f.name: raw[f.name] for f in fields(TrainingState)} | {"data": tuple(raw["data"])})
        for name in ("iteration", "consumed_samples", "optimizer_steps"):
            if type(count := getattr(state, name)) is not int or count < 0:
                raise ValueError(f"{name} is {count!r}")
        if not all(isinstance(name, str) for name in (*state.data, state.wandb_run_id or "")):
            raise ValueError("data and wandb_run_id are names")
    return state


def save_checkpoint(
    directory: str | Path,
    shards: Sequence[TensorShard],
    state: TrainingState,
    run: dict[str, Any],
    random_state: dict[str, Any] | None,
    *,
    tokenizer: Path | None = None,
    keep_last: int | None = None,
) -> Path:
    """Save a checkpoint of all ranks; every rank must call this.

    Args:
        tokenizer: directory whose tokenizer the checkpoint carries.
        keep_last: remove all but this many checkpoints; the newest two are always kept.

    Raises:
        CheckpointError: a rank could not write, or a number is not finite; on every rank, and nothing is left of it.
    """
    directory = Path(directory)
    final = directory / checkpoint_name(state.iteration)
    partial = final.with_name(final.name + UNFINISHED)
    try:
        _save(partial, final, shards, state, run, random_state, tokenizer)
        _together(lambda: _remove_old(directory, keep_last) if dist.get_rank() == 0 else None)
    except CheckpointError:
        if dist.get_rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)  # a full disk needs the room
        raise
    return final


def _save(
    partial: Path,
    final: Path,
    shards: Sequence[TensorShard],
    state: TrainingState,
    run: dict[str, Any],
    random_state: dict[str, Any] | None,
    tokenizer: Path | None,
) -> None:
    _together(lambda: _require_finite(shards))
    _together(lambda: _prepare(partial) if dist.get_rank() == 0 else None)
    written = _together(lambda: _write_shards(partial, shards))
    states = _gather(random_state)

    def finish() -> None:
        if dist.get_rank() == 0:
            write_metadata(partial, [record for records, _ in written for record in records])
            write_small_files(partial, state, run, tokenizer)
            _write_saved(partial / RNG_FILE, states)
            write_manifest(partial, {name: file_sum for _, sums in written for name, file_sum in sums.items()})
            publish(partial, final, state.iteration)

    _together(finish)


def write_small_files(partial: Path, state: TrainingState, run: dict[str, Any], tokenizer: Path | None) -> None:
    """Write what stands beside the tensors, including the two files megatron-core itself asks for."""
    if tokenizer is not None and tokenizer.is_dir():
        (partial / TOKENIZER_FOLDER).mkdir()
        copy_tokenizer(tokenizer, partial / TOKENIZER_FOLDER)
    write_run(partial, run)
    write_text(partial / STATE_FILE, json.dumps(asdict(state), indent=2) + "\n")
    _write_saved(partial / "common.pt", {"iteration": state.iteration, "checkpoint_version": 3.0})
    backends = {
        "sharded_backend": "torch_dist",
        "sharded_backend_version": 1,
        "common_backend": "torch",
        "common_backend_version": 1,
    }
    write_text(partial / "metadata.json", json.dumps(backends) + "\n")


def _write_saved(path: Path, content: Any) -> None:
    """torch.save, which would say nothing useful of a full disk."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_bytes(path, buffer.getbuffer())


def publish(partial: Path, final: Path, iteration: int, *, sync: bool = True) -> None:
    """Give a finished checkpoint its name, with `sync` only once everything is on disk, and note it as the newest."""
    for path in (*partial.rglob("*"), partial) if sync else ():
        _sync(path)
    replaced = _set_aside(final) if final.exists() else None
    partial.rename(final)
    if replaced is not None:
        shutil.rmtree(replaced)
    tracker = final.parent / TRACKER_FILE
    beside = tracker.with_name(tracker.name + UNFINISHED)
    beside.write_text(f"{iteration}\n")
    beside.rename(tracker)
    _sync(final.parent)


def load_shards(checkpoint: Path, shards: Sequence[TensorShard]) -> None:
    """Fill the memory of `shards` from `checkpoint`, whatever layout it was saved in.

    Raises:
        CheckpointError: naming every tensor that is missing or has another shape.
    """
    require_whole_together(checkpoint)
    reader = TorchDistReader(checkpoint)
    fill_shards(reader, checkpoint, shards)
    reader.close()


class ShardReader(Protocol):
    """StorageLocation tensors of which shards can be read."""

    @property
    def tensors(self) -> Collection[str]:
        """The keys."""

    def shape(self, key: str) -> Shape:
        """Global shape of a tensor."""

    def read_into(self, key: str, offset: Shape, target: torch.Tensor) -> None:
        """Fill `target` with the shard of `key` at `offset`, converting the dtype where it differs."""


def fill_shards(reader: ShardReader, checkpoint: Path, shards: Sequence[TensorShard]) -> None:
    """`load_shards` from whatever reads the tensors of `checkpoint`."""
    afresh = {
        shard.key
        for shard in shards
        if shard.optional and (shard.key not in reader.tensors or reader.shape(shard.key) != shard.global_shape)
    }
    if afresh:
        log.info("%s lacks %d tensors that start afresh, such as %s", checkpoint, len(afresh), min(afresh))
    shards = [shard for shard in shards if shard.key not in afresh]
    faults = []
    for key, shape in {shard.key: shard.global_shape for shard in shards}.items():
        if key not in reader.tensors:
            faults.append(f"missing: {key} {list(shape)}")
        elif reader.shape(key) != shape:
            faults.append(f"misshapen: {key} is {list(reader.shape(key))}, this run needs {list(shape)}")
    if faults:
        shown = "\n".join(f"  {fault}" for fault in faults[:20])
        more = f"\n  and {len(faults) - 20} more" if len(faults) > 20 else ""
        raise CheckpointError(f"{checkpoint} does not fit this run:\n{shown}{more}")
    with torch.no_grad():
        for shard in sorted(shards, key=lambda shard: (shard.key, shard.offset)):
            reader.read_into(shard.key, shard.offset, shard.data)


def read_random_state(checkpoint: Path, rank: int) -> dict[str, Any] | None:
    """The random states that `rank` saved; None if there was none, or no training made the checkpoint."""
    path = checkpoint / RNG_FILE
    if not path.is_file():
        return None
    check_manifest(checkpoint, CheckpointError, only=(RNG_FILE,), checksums=True, advice=_way_out(checkpoint))
    with reading(path, CheckpointError, advice="without it, removed, training goes on with fresh random numbers"):
        states = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(states, list) or not all(isinstance(state, dict | None) for state in states):
            raise ValueError("not the random states of a run")
    return states[rank] if rank < len(states) else None


def _write_shards(partial: Path, shards: Sequence[TensorShard]) -> tuple[list[ChunkRecord], dict[str, FileSum]]:
    """Write this rank's file; return its chunks and its sum."""
    writer = TorchDistWriter(partial, f"__{dist.get_rank()}_0.distcp")
    try:
        for shard in shards:
            if shard.is_writer:
                writer.write(shard.key, shard.global_shape, shard.offset, shard.data)
        return writer.finish(), {writer.name: writer.sum}
    except BaseException:
        writer.abandon()
        raise


def _require_finite(shards: Sequence[TensorShard]) -> None:
    """Raise CheckpointError where a number of this rank is not: a run that diverged must not replace a good state."""
    bad = {
        shard.key
        for shard in shards
        if shard.is_writer and shard.data.is_floating_point() and not bool(torch.isfinite(shard.data).all())
    }
    if bad:
        raise CheckpointError(
            f"{len(bad)} tensors hold NaN or infinity, such as {min(bad)}: the run has diverged. Start it again to go "
            "on from the newest checkpoint, with a lower optimizer.lr or past the bad batches (train.skip_steps)"
        )


def _together(action: Any) -> list[Any]:
    """Run `action` on every rank; return every rank's result, or raise everywhere if any rank failed."""
    result, failure = None, None
    try:
        result = action()
    except (OSError, RuntimeError, CheckpointError) as error:
        failure = f"rank {dist.get_rank()}: {error}"
    outcomes = _gather((result, failure))
    failures = [why for _, why in outcomes if why]
    if failures:
        raise CheckpointError("the checkpoint was not saved:\n  " + "\n  ".join(failures))
    return [value for value, _ in outcomes]


def _gather(value: Any) -> list[Any]:
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def _prepare(partial: Path) -> None:
    for leftover in _unfinished(partial.parent):
        if _is_leftover(leftover):
            log.warning("removing %s, left by a save that did not finish", leftover)
            shutil.rmtree(leftover)
    partial.mkdir(parents=True)


def _unfinished(directory: Path) -> list[Path]:
    return sorted(directory.glob(f"iter_*{UNFINISHED}")) if directory.is_dir() else []


def _is_leftover(path: Path) -> bool:
    """Whether all that is at `path` is what a save writes."""
    known = (*CHECKPOINT_CONTENTS, f"*{UNFINISHED}")
    return (
        path.is_dir()
        and not path.is_symlink()
        and all(any(fnmatch.fnmatch(entry.name, pattern) for pattern in known) for entry in path.iterdir())
    )


def in_the_way(directory: Path) -> list[Path]:
    """What stands in a run's directory where a save may have to write, but was not left by one."""
    return [path for path in _unfinished(directory) if not _is_leftover(path)]


def _remove_old(directory: Path, keep_last: int | None) -> None:
    if keep_last is not None:
        # A newest one that turns out to be bad is never the only one.
        for old in complete_checkpoints(directory)[: -max(keep_last, 2)]:
            shutil.rmtree(_set_aside(old))


def _set_aside(checkpoint: Path) -> Path:
    """Rename a checkpoint so that it stops looking complete before its first file is deleted."""
    aside = checkpoint.with_name(f"{checkpoint.name}.old{UNFINISHED}")
    shutil.rmtree(aside, ignore_errors=True)
    return checkpoint.rename(aside)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
