"""The training loop: take a batch from the stream, step, and let the hooks see the verdict."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from megatron_ext.checkpoint.both_places import prepare_directory
from megatron_ext.checkpoint.collective import on_first_rank_slowly
from megatron_ext.config import Layout, RunConfig
from megatron_ext.config.load import values_of
from megatron_ext.errors import EnvironmentFault
from megatron_ext.launcher import exit_stopped, launched_rank, launched_world_size, noting_failure
from megatron_ext.monitoring.clock import Clock
from megatron_ext.monitoring.events import Event
from megatron_ext.monitoring.monitor import metrics_path
from megatron_ext.monitoring.refused import alerting_of_refusal
from megatron_ext.roll_call import on_every_rank
from megatron_ext.runtime import accelerators
from megatron_ext.runtime.cpu_memory import keep_freed_memory
from megatron_ext.runtime.device import choose_device
from megatron_ext.runtime.installation import installation
from megatron_ext.runtime.liveness import Liveness
from megatron_ext.runtime.logs import setup_logging
from megatron_ext.runtime.process_groups import Groups, end_process_groups, split_process_group, start_process_group
from megatron_ext.training.banner import banner
from megatron_ext.training.data import RunData, open_data
from megatron_ext.training.exit_at import ended_by_plan, exit_moment
from megatron_ext.training.findings import Findings
from megatron_ext.training.guard.guard import Guard
from megatron_ext.training.hooks.base import Hook, StepDone
from megatron_ext.training.hooks.disk_room import DiskRoom
from megatron_ext.training.hooks.evaluating import Evaluating
from megatron_ext.training.hooks.reports import Reports
from megatron_ext.training.hooks.saving import Saving
from megatron_ext.training.hooks.slow_ranks import SlowRanks
from megatron_ext.training.hooks.validation import Validation
from megatron_ext.training.planned import with_planned_length
from megatron_ext.training.run_lock import run_lock
from megatron_ext.training.same_everywhere import open_everywhere, require_same_code, require_same_run
from megatron_ext.training.session import Session, open_session, starting_state
from megatron_ext.training.signals import StopSignals, stop_name
from megatron_ext.training.start import OpenForeign, no_foreign_weights
from megatron_ext.training.startup_checks import examine_run
from megatron_ext.training.verdict import Skip

log = logging.getLogger(__name__)


def train(
    run: RunConfig, others: Liveness, source: str = "the run", open_foreign: OpenForeign = no_foreign_weights
) -> None:
    """Run, or continue, the training that `run` describes, as one of the processes the launcher started.

    Args:
        others: the watch over the other ranks, as of `watching`; ends with the last step.
        source: where the run is from, for messages.
        open_foreign: opens weights to start from that are no Megatron checkpoint.

    Raises:
        SystemExit: a signal or train.exit_at asked it to stop, and it has saved; with the exit code of the signal (143
            after SIGTERM, 142 for train.exit_at), which our launcher takes over.
    """
    setup_logging(launched_rank())
    is_first, minutes = launched_rank() == 0, run.runtime.distributed_timeout_minutes
    with alerting_of_refusal(lambda: values_of(run)), others.speaking():
        layout, device = on_every_rank("node", lambda: _prepared(run), minutes)
        found = on_every_rank(
            "run", lambda: examine_run(run, source, open_foreign) if is_first else None, minutes, looking=1
        )
        start_process_group(run.runtime, device, on_failure=others.end_if_missing)
    others.met()
    with noting_failure(), ExitStack() as held:
        with alerting_of_refusal(lambda: values_of(run)):
            require_same_code(installation())
            require_same_run(run)
            groups = split_process_group(run.parallel, run.runtime)
            held.enter_context(run_lock(run.checkpoint.directory))
        signal = open_and_train(run, layout, groups, device, others, open_foreign, found)
    others.end()
    end_process_groups()
    if signal:
        exit_stopped(128 + signal)


def _prepared(run: RunConfig) -> tuple[Layout, torch.device]:
    """What this rank needs before it meets the others; wrong with it may be what is wrong with its node."""
    layout = run.resolve(launched_world_size())
    flex = run.parallel.flex_backend
    accelerators.require(run.runtime, run.precision, has_experts=run.model.is_moe, flex=flex)
    device = choose_device(run.runtime)
    _require_a_host_beside(device, run)
    if device.type == "cpu":
        keep_freed_memory()
    return layout, device


def _require_a_host_beside(device: torch.device, run: RunConfig) -> None:
    """Raise where what the run keeps in the host's memory would be moved from there to there."""
    moved = (
        (run.optimizer.moments_on_host, "optimizer.moments_on_host = true"),
        (run.recompute.offload_layers, f"recompute.offload_layers = {run.recompute.offload_layers}"),
    )
    for is_moved, key in moved:
        if is_moved and device.type == "cpu":
            raise EnvironmentFault(f"{key}, but no GPU is here: a CPU computes in its own memory; remove it")


def open_and_train(
    run: RunConfig,
    layout: Layout,
    groups: Groups,
    device: torch.device,
    others: Liveness,
    open_foreign: OpenForeign = no_foreign_weights,
    found: Findings | None = None,
) -> int:
    """Train to the end; return 0, or the signal that stopped it before.

    Args:
        others: the watch over the other ranks, as of `watching`.
        found: what to say of the run before its first step; on the rank that says it.
    """
    settings = run.checkpoint
    with alerting_of_refusal(lambda: values_of(run)):
        on_first_rank_slowly(
            lambda: prepare_directory(Path(settings.directory), settings.copy_to),
            "the run cannot go on from where it was",
        )
        # The data first: what is wrong with it is said before minutes go into building the model.
        data = open_everywhere(
            lambda: open_data(run, starting_state(run), groups.dp, device),
            first_rank_first=run.data.cache_dir is not None,
        )
    run = with_planned_length(run, data.plan)
    guard, hooks = build_hooks(run, layout, data)
    with closing(data), telling_hooks(hooks), others.named_if_missing():
        session = open_session(
            run, layout, groups, device, data.train, data.plan, open_foreign=open_foreign, hooks=hooks, guard=guard
        )
        session.state = replace(session.state, data=data.fingerprints)
        for hook in hooks:
            hook.on_start(session)
        others.tell(partial(_tell_of_stall, session, hooks))
        for line in banner(run, layout, device, found) if found is not None else ():
            log.info(line)
        is_first = groups.world.rank() == 0
        moment = exit_moment(run.train.exit_at) if is_first else None
        with StopSignals(speaks=is_first, ends_at=moment.seconds if moment else None) as stop:
            signal = train_steps(session, hooks, stop, others)
            session.checkpoints.close()
    return signal


def _tell_of_stall(session: Session, hooks: Sequence[Hook], kind: str, text: str, ends: bool) -> None:
    """What the watch over the other ranks calls once the run has its records."""
    for hook in hooks:
        hook.on_stall(Event(kind, session.state.iteration, text), ends=ends)


def build_hooks(run: RunConfig, layout: Layout, data: RunData) -> tuple[Guard, list[Hook]]:
    """The judge of the steps of a run; and what happens around them, in this order."""
    clock = Clock()
    reports = Reports(run, layout, clock)
    guard = Guard(run.guard, reports.event)
    hooks: list[Hook] = [reports, guard, SlowRanks(run.logging.log_interval, reports.event)]
    if data.validation is not None:
        hooks.append(Validation(run.train, data.validation, clock, reports.validation))
    hooks.append(DiskRoom(run, reports.event))
    if run.evaluation.on_checkpoint is not None:
        hooks.append(Evaluating(run.evaluation, Path(run.checkpoint.directory), metrics_path(run), reports.event))
    return guard, [*hooks, Saving(run.checkpoint, metrics_path(run), clock, reports.event, hooks)]


@contextmanager
def telling_hooks(hooks: Sequence[Hook]) -> Iterator[None]:
    """Tell the hooks how the run ends, also where it ends before it has begun."""
    try:
        yield
    except BaseException as error:
        for hook in hooks:
            hook.on_error(error)
        raise
    for hook in reversed(hooks):  # reports, the first of them, take what others tell at their end
        hook.close()


def train_steps(session: Session, hooks: Sequence[Hook], stop: StopSignals, others: Liveness) -> int:
    """Train until the last step or a signal, which is returned."""
    plan = session.run.train
    last = min(plan.train_iters, plan.stop_at_iteration or plan.train_iters)
    if session.state.iteration >= last:
        log.info("nothing to do: %d of %d steps are done", session.state.iteration, plan.train_iters)
    began = session.state.iteration
    while session.state.iteration < last:
        done = ended_by_plan(plan.exit_at, _next_step(session, last, stop, others), began)
        for hook in hooks:
            hook.after_step(session, done)
            session.mark(type(hook).__name__.lower())
        if done.signal:
            what = stop_name(done.signal)
            log.info("stopped by %s after step %d; the same command goes on from there", what, done.iteration)
            return done.signal
    return 0


def _next_step(session: Session, last: int, stop: StopSignals, others: Liveness) -> StepDone:
    """Do the next step, or pass over it."""
    first = session.stream.position().samples
    if (key := session.skips_next()) is not None:
        session.pass_over()
        skip = Skip(key)
        return StepDone(session.state.iteration, last, skip, first, ends_stage=session.ends_stage())
    with others.step():
        session.pace.begin(session.device)
        batch = session.stream.next()
        session.mark("data")
        result = session.step(batch, stop.is_noted)
    signal = stop.agreed(result.asking_to_stop, session.groups.world, session.device)
    if session.state.iteration >= last:
        signal = 0  # it ends as planned
    return StepDone(session.state.iteration, last, result.verdict, first, result, signal, session.ends_stage())
