"""The newest complete checkpoint over a run's directory and its second place: brought back where it is there."""

import logging
from dataclasses import dataclass
from pathlib import Path

from megatron_ext.checkpoint.find import checkpoints_of, complete_checkpoints, faults_of, iteration_of
from megatron_ext.checkpoint.integrity import require_whole
from megatron_ext.checkpoint.publish import publish
from megatron_ext.checkpoint.second_place import SecondPlace
from megatron_ext.errors import CheckpointError
from megatron_ext.files import UNFINISHED, unfinished_place

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Ahead:
    """A complete copy at the second place that the run's directory has nothing as new as."""

    name: str
    place: SecondPlace
    damaged: Path | None
    """What the directory has of it, which is not complete."""
    why: str
    """Why it is taken."""


def ahead_of(directory: Path, copy_to: str | None) -> Ahead | None:
    """What a run that goes on in `directory` must bring back first; None where nothing is newer at `copy_to`.

    Raises:
        CheckpointError: there is no such kind of place; it is another run's; or it cannot be read, and the directory
            has no checkpoint: whether there has been a run is then unknown.
    """
    if copy_to is None:
        return None
    own = checkpoints_of(directory)
    newest = iteration_of(own[-1]) if own else -1
    place = SecondPlace(copy_to)
    try:
        names = place.complete()
    except CheckpointError as error:
        if not own:
            raise CheckpointError(
                f"{error}\n  {directory} has no checkpoint, and whether one is there is unknown. Make it readable, or "
                "take out checkpoint.copy_to to begin a new run"
            ) from error
        log.warning("%s; going on from what is in %s", error, directory)
        return None
    if not names:
        return None
    place.require_run(names[-1], directory)
    if (at := int(names[-1][5:])) < newest:
        return None
    if at > newest:
        why = f"{directory} has {own[-1].name}" if own else f"{directory} has no checkpoint"
        return Ahead(names[-1], place, None, why)
    fault = _fault_of(own[-1])
    return Ahead(names[-1], place, own[-1], fault) if fault is not None else None


def prepare_directory(directory: Path, copy_to: str | None) -> None:
    """Have the newest complete checkpoint of both places in `directory`. One process of a run calls this.

    Raises:
        CheckpointError: it could not be brought back, or all that is left of a run is one that was being replaced.
        OSError: it could not be written.
    """
    if (ahead := ahead_of(directory, copy_to)) is not None:
        _bring_back(ahead, directory)
    if checkpoints_of(directory) or not directory.is_dir():
        return
    if aside := sorted(directory.glob(f"iter_*.old{UNFINISHED}")):
        raise CheckpointError(
            f"{directory} has no checkpoint, but {aside[-1].name}, one that was being replaced or removed when the run "
            f"was ended. To go on from it, give it its name: mv {aside[-1]} {directory / aside[-1].name.split('.')[0]}"
        )


def _bring_back(ahead: Ahead, directory: Path) -> None:
    log.warning("%s; going on from %s/%s, which is brought back", ahead.why, ahead.place.url, ahead.name)
    final = directory / ahead.name
    partial = unfinished_place(final)
    try:
        ahead.place.fetch(ahead.name, partial)
    except CheckpointError as error:
        raise CheckpointError(f"{error}\n  {_way_out(ahead, directory)}") from error
    if ahead.damaged is not None:
        aside = final.with_name(f"{final.name}.damaged")
        if aside.exists():
            raise CheckpointError(f"{final} is damaged, and so was {aside}; move that away")
        final.rename(aside)
        log.warning("%s is kept as %s", final, aside)
    publish(partial, final, iteration_of(final), replace=False)


def _way_out(ahead: Ahead, directory: Path) -> str:
    """What to do where what is ahead cannot be brought back."""
    older = [own for own in complete_checkpoints(directory) if own != ahead.damaged]
    away = " and ".join(filter(None, (f"{ahead.place.url}/{ahead.name}", str(ahead.damaged or ""))))
    without = f"; to go on from an older one ({older[-1]}), move {away} away" if older else ""
    return f"Start again where the place could not be read{without}"


def _fault_of(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint of the directory, by the sizes of its files."""
    if faults := faults_of(checkpoint):
        return f"{checkpoint}: {'; '.join(faults)}"
    try:
        require_whole(checkpoint)
    except CheckpointError as error:
        return str(error)
    return None
