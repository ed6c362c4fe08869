"""Are the files of a checkpoint those that its manifest lists? Asked before anything is read from it."""

from pathlib import Path

import torch.distributed as dist

from megatron_ext.checkpoint.collective import gathered
from megatron_ext.checkpoint.find import complete_checkpoints
from megatron_ext.checkpoint.tokenizer_files import TOKENIZER_FOLDER
from megatron_ext.errors import CheckpointError
from megatron_ext.manifest import check_manifest, manifest_faults, raise_faults, read_manifest


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


def require_whole_file(checkpoint: Path, name: str) -> None:
    """Raise CheckpointError where the one file `name` of `checkpoint` is not what its manifest says, by checksum."""
    check_manifest(checkpoint, CheckpointError, only=(name,), checksums=True, advice=_way_out(checkpoint))


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
    everywhere = [fault for part in gathered(faults) for fault in part]
    raise_faults(checkpoint, CheckpointError, everywhere, _way_out(checkpoint))


def _way_out(checkpoint: Path) -> str:
    """What to do where `checkpoint` is damaged."""
    older = [entry for entry in complete_checkpoints(checkpoint.parent) if entry.name < checkpoint.name]
    if not older:
        return "take them from a copy"
    return (
        f"take them from a copy, or go on from {older[-1].name}, the checkpoint before: "
        f"mv {checkpoint} {checkpoint}.damaged, and start again, which brings its copy at checkpoint.copy_to back, if "
        "there is one"
    )
