"""Ranks killed while a checkpoint is written, completed or copied, or in validation: the run goes on from the newest.

A run of six steps saves every second one.
"""

from pathlib import Path

import pytest

from megatron_ext.checkpoint.find import find_checkpoint, require_checkpoint
from megatron_ext.checkpoint.second_place import SecondPlace
from megatron_ext.checkpoint.streams import MegatronSource
from megatron_ext.testing.pool import GlooPool, WorkerFailure
from tests.robustness.runs import losses, train_and_die_at, train_here

# Rank, the operation on a file before which it is killed, and the steps of which the newest one that is left may be.
KILLS = {
    "before its first byte": (1, "open", "iter_0000004.partial/__1_0.distcp", "2"),
    "between the notes": (0, "open", "iter_0000004.partial/.__0.note.", "2"),
    "before the metadata": (0, "open", "iter_0000004.partial/..metadata.", "2"),
    "before its name": (0, "os.rename", "iter_0000004.partial", "2"),
    "before the tracker": (0, "open", "latest_checkpointed_iteration.txt.partial", "24"),
    "in the copy": (0, "open", "second/iter_0000004.partial/__0_0.distcp", "4"),
    "before the name of the copy": (0, "os.rename", "second/iter_0000004.partial", "4"),
    "in the validation after step 5": (1, "validation", "", "24"),
}
IN_SUITE = ("between the notes", "in the copy", "in the validation after step 5")


@pytest.fixture(scope="module")
def undisturbed(work: Path, pool: GlooPool) -> Path:
    directory = work / "undisturbed_by_kills"
    pool.run(2, train_here, work / "run.yaml", [f"checkpoint.directory={directory}"])
    return directory


# What a kill costs is starting the ranks twice; those that are left out differ from these in the file alone.
@pytest.mark.parametrize(
    "moment",
    [pytest.param(moment, marks=() if moment in IN_SUITE else pytest.mark.product) for moment in KILLS],
)
def test_the_run_goes_on_bit_for_bit(moment: str, work: Path, undisturbed: Path) -> None:
    rank, operation, file, left = KILLS[moment]
    directory = work / moment.replace(" ", "_")
    run, second = directory / "run", directory / "second"
    overrides = [f"checkpoint.directory={run}", f"checkpoint.copy_to={second}", "train.eval_interval=5"]
    with GlooPool(2) as two:
        with pytest.raises(WorkerFailure, match=f"rank {rank} died"):
            two.run(2, train_and_die_at, work / "run.yaml", overrides, rank, operation, str(directory), file)
        newest = find_checkpoint(run)
        assert newest is not None
        assert newest.name[-1] in left
        two.run(2, train_here, work / "run.yaml", overrides)
    assert losses(run) == losses(undisturbed)
    ours, theirs = (MegatronSource(require_checkpoint(place)) for place in (run, undisturbed))
    assert all((ours.read(name) == theirs.read(name)).all() for name in theirs.specs)
    assert SecondPlace(str(second)).complete()[-1] == "iter_0000006"
    assert not [path.name for place in (run, second) for path in place.iterdir() if path.name.endswith(".partial")]
