"""The plan of a run as `tools/inspect_data.py plan` prints it: before its data are there, at its start, on the way."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from megatron_ext.config import RunConfig
from megatron_ext.config.load import raise_faults, values_of
from megatron_ext.data.stream.plan import RunPlan
from megatron_ext.data.tokenizer import Tokenizer
from megatron_ext.errors import ConfigError
from megatron_ext.planning.data_table import plan_table, plan_warnings
from megatron_ext.training.data_files import DataFiles
from megatron_ext.training.planned import plan_data, source_paths, stated_plan, with_planned_length
from megatron_ext.training.schedule import learning_rate
from megatron_ext.training.schedule_faults import schedule_faults
from megatron_ext.training.session import starting_state


def show_plan(run: RunConfig, source: str) -> Iterator[str]:
    """Lines for people: every stage with its sources, the total, and warnings.

    What a checkpoint of the run says it has read is taken into account. Where files are not there, the plan is made of
    what the configuration says of all sources.

    Args:
        source: where the run is from, for messages.

    Raises:
        ConfigError: a source is missing or no good, or the stages cannot be read from them; every fault at once.
    """
    plan, warnings = _plan_of(run, source)
    run = with_planned_length(run, plan)
    raise_faults(source, schedule_faults(run, plan))
    state = starting_state(run)
    if state.iteration:
        yield f"{state.iteration:,} of {plan.total_steps:,} steps are done: {run.checkpoint.directory}"
    yield from plan_table(plan, partial(learning_rate, run, plan))
    yield from (f"warning: {warning}" for warning in (*warnings, *plan_warnings(plan, run.data)))


def _plan_of(run: RunConfig, source: str) -> tuple[RunPlan, list[str]]:
    """The plan, and what was found about the files."""
    missing = [f"{key} = {path}" for key, path in source_paths(run.data).values() if not Path(f"{path}.bin").is_file()]
    if missing and (plan := stated_plan(run.data, run.train)) is not None:
        return plan, []
    if missing:
        way_out = "is not there; prepare it, or say the tokens of every source of data.sources"
        raise_faults(source, [f"{path}: {way_out}" for path in missing])
    faults: list[str] = []
    files = DataFiles(values_of(run), Tokenizer(run.data.tokenizer), faults)
    sizes = files.look()
    raise_faults(source, faults)
    if sizes is None:
        raise ConfigError(f"{source}: the sizes of its data are not known")
    plan = plan_data(run.data, run.train, sizes, starting_state(run), run.checkpoint.directory)
    return plan, files.warnings
