"""How many checkpoints a run adds, against saving and removing them one by one."""

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from megatron_ext.checkpoint.find import checkpoint_name, iteration_of
from megatron_ext.config import CheckpointConfig
from megatron_ext.planning.room import checkpoints_to_come, retention_of, saved_steps

settings = st.builds(
    CheckpointConfig,
    directory=st.just("run"),
    save_interval=st.sampled_from([None, 1, 3]),
    save_initial=st.booleans(),
    keep_last=st.sampled_from([None, 1, 2, 4]),
    keep_every=st.sampled_from([None, 6]),
    keep_matching=st.sampled_from([None, r"\d", ".*2", "nothing"]),
)


@given(settings, st.integers(0, 20), st.integers(0, 30), st.sets(st.integers(0, 20)))
def test_never_more_come_than_are_said_to_and_hardly_fewer(
    settings: CheckpointConfig, done: int, steps: int, before: set[int]
) -> None:
    there = [Path(checkpoint_name(step)) for step in sorted(before) if step <= done]
    said = checkpoints_to_come(settings, done, done + steps, [iteration_of(path) for path in there])
    retention, stand, most = retention_of(settings), list(there), 0
    for step in saved_steps(settings, done, done + steps):
        stand.append(Path(checkpoint_name(step)))
        most = max(most, len(stand) - len(there))
        stand = [path for path in stand if path not in retention.superseded(stand)]
    assert most <= said
    # Kept ones count among the newest, too, before they are old.
    assert said <= most + (retention.newest or 0) + 1


def test_what_an_expression_keeps_is_counted() -> None:
    kept = CheckpointConfig(directory="run", save_interval=10, keep_last=2, keep_matching="[1-4]00")
    assert checkpoints_to_come(kept, 0, 1000, []) == 3 + 4
    assert checkpoints_to_come(kept, 250, 1000, [100, 200, 240, 250]) == 1 + 2
    assert list(saved_steps(kept, 985, 995)) == [990, 995]
