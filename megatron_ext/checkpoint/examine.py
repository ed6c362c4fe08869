"""Are the files of a finished directory (checkpoint, export, prepared data) those that were written?"""

from dataclasses import dataclass
from pathlib import Path

from megatron_ext.checkpoint.find import find_checkpoint, require_directory
from megatron_ext.checkpoint.integrity import require_whole
from megatron_ext.errors import CheckpointError, MegatronExtError
from megatron_ext.manifest import MANIFEST_FILE, check_manifest, read_manifest, write_manifest

_WEIGHTS = ("*.safetensors", "*.safetensors.index.json")


@dataclass(frozen=True)
class Examination:
    """A directory whose files are those of its manifest."""

    directory: Path
    files: int
    bytes: int


def examine(path: str | Path) -> Examination:
    """Compare every file of the directory `path` (of a run's: its newest checkpoint) with the manifest, by checksum.

    Raises:
        CheckpointError: it has no manifest, or files are missing or changed; names them.
    """
    directory = finished_directory(path)
    manifest = read_manifest(directory, CheckpointError)
    if manifest is None:
        raise CheckpointError(
            f"{directory}: has no {MANIFEST_FILE}, so there is nothing to compare its files with: an older version or "
            "somebody else wrote it; pass --write to have its files listed as they are now"
        )
    if find_checkpoint(directory) == directory:
        require_whole(directory, checksums=True)
    else:
        check_manifest(directory, CheckpointError, checksums=True)
    return Examination(directory, len(manifest), sum(entry.bytes for entry in manifest.values()))


def check_checksums(path: str | Path, error: type[MegatronExtError]) -> None:
    """Compare the files of a checkpoint, or the weights of an export, with its manifest, if it has one.

    What people may edit in an export (its configurations, card and tokenizer) is left to `examine`.

    Raises:
        CheckpointError, error: files are missing or changed.
    """
    directory = finished_directory(path)
    if find_checkpoint(directory) == directory:
        require_whole(directory, checksums=True)
    else:
        check_manifest(directory, error, checksums=True, only=_WEIGHTS)


def write_anew(path: str | Path) -> Examination:
    """Write the manifest of a directory as it is now."""
    directory = finished_directory(path)
    write_manifest(directory)
    return examine(directory)


def finished_directory(path: str | Path) -> Path:
    """`path`, or the newest checkpoint in it.

    Raises:
        CheckpointError: there is no such directory.
    """
    directory = Path(path)
    require_directory(directory)
    if (directory / MANIFEST_FILE).exists():
        return directory
    return find_checkpoint(directory) or directory
