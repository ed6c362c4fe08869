"""The training loop."""

import contextlib
import logging
from dataclasses import replace
from signal import Signals

import torch
import torch.distributed as dist

from megatron_ext.config import Layout, RunConfig
from megatron_ext.launcher import launched_rank, launched_world_size
from megatron_ext.mcore.optimizer import set_learning_rate
from megatron_ext.monitoring.monitor import Monitor, StepReport
from megatron_ext.runtime import accelerators
from megatron_ext.runtime.device import choose_device
from megatron_ext.runtime.liveness import Liveness
from megatron_ext.runtime.logs import setup_logging
from megatron_ext.runtime.process_groups import Groups, end_process_groups, split_process_group, start_process_group
from megatron_ext.training.banner import banner
from megatron_ext.training.preflight import Findings, examine_run
from megatron_ext.training.run_lock import run_lock
from megatron_ext.training.schedule import learning_rate
from megatron_ext.training.session import RunData, Session, open_session, starting_state
from megatron_ext.training.signals import StopSignals
from megatron_ext.training.step import StepResult

log = logging.getLogger(__name__)


def train(run: RunConfig, source: str = "the run") -> None:
    """Run, or continue, the training that `run` describes, as one of the processes the launcher started.

    Args:
        source: where the run is from, for messages.

    Raises:
        SystemExit: a signal asked it to stop, and it has saved; with the exit code of the signal (143 after SIGTERM).
    """
    setup_logging(launched_rank())
    layout = run.resolve(launched_world_size())
    accelerators.require(run.runtime, run.precision, has_experts=run.model.is_moe)
    found = examine_run(run, source) if launched_rank() == 0 else None
    device = choose_device(run.runtime)
    start_process_group(run.runtime, device)
    groups = split_process_group(run.parallel, run.runtime)
    with run_lock(run.checkpoint.directory):
        signal = _open_and_train(run, layout, groups, device, found)
    end_process_groups()
    if signal:
        raise SystemExit(128 + signal)


def _open_and_train(
    run: RunConfig, layout: Layout, groups: Groups, device: torch.device, found: Findings | None
) -> int:
    """Train to the end; return 0, or the signal that stopped it before."""
    # The data first: what is wrong with it is said before minutes go into building the model.
    data = RunData(run, starting_state(run))
    session = open_session(run, layout, groups, device)
    session.state = replace(session.state, data=data.fingerprints)
    is_reporter = dist.get_rank() == 0
    monitor = Monitor(run, layout, session.state.iteration, session.wandb_run_id) if is_reporter else None
    for line in banner(run, layout, device, found) if found is not None else ():
        log.info(line)
    try:
        signal = _train_watched(session, data, monitor)
    except BaseException:
        # No collective after a failure: another rank may never join it.
        if monitor is not None:
            monitor.close(failed=True)
        raise
    if monitor is not None:
        monitor.close()
    return signal


def _train_watched(session: Session, data: RunData, monitor: Monitor | None) -> int:
    """`_train`, with an eye on the other ranks: one that is missing is named, where the backend only knows a socket."""
    with Liveness() as others, StopSignals(speaks=monitor is not None) as stop:
        try:
            return _train(session, data, monitor, stop)
        except RuntimeError:
            others.end_if_missing()
            raise


def _train(session: Session, data: RunData, monitor: Monitor | None, stop: StopSignals) -> int:
    """Train until the last step or a signal, which is returned."""
    run = session.run
    last = min(run.train.train_iters, run.train.stop_at_iteration or run.train.train_iters)
    if session.state.iteration >= last:
        log.info("nothing to do: %d of %d steps are done", session.state.iteration, run.train.train_iters)
        return 0
    for batch in data.train(session):
        signal = 0
        if session.skips_next():
            _pass_over(session, monitor)
        else:
            lr = learning_rate(run, session.state.iteration)
            set_learning_rate(session.optimizer, lr)
            result = session.step(batch, lambda: stop.number != 0)
            signal = stop.agreed(result.asking_to_stop, session.groups.world, session.device)
            if session.state.iteration == last:
                signal = 0  # it ends as planned
            if signal or _due(session.state.iteration, run.logging.log_interval, last):
                _report(session, monitor, result, lr)
        done = session.state.iteration
        with monitor.clock_stopped() if monitor is not None else contextlib.nullcontext():
            if run.train.eval_interval is not None and _due(done, run.train.eval_interval, last) and not signal:
                _validate(session, data, monitor)
            if _due(done, run.checkpoint.save_interval, last) or signal:
                log.info("saved %s", session.save())
        if signal:
            log.info("stopped by %s after step %d; the same command goes on from there", Signals(signal).name, done)
            return signal
        if done == last:
            break
    return 0


def _pass_over(session: Session, monitor: Monitor | None) -> None:
    """Pass over the samples of the next step, and leave a trace of it."""
    first = session.state.consumed_samples
    session.pass_over()
    done, last = session.state.iteration, session.state.consumed_samples - 1
    log.info("step %d: passed over, with samples %d to %d (train.skip_steps)", done, first, last)
    if monitor is not None:
        monitor.skipped(done, first, last)


def _validate(session: Session, data: RunData, monitor: Monitor | None) -> None:
    loss = session.validate(data.validation(session))
    if monitor is not None:
        monitor.validation(session.state.iteration, loss)


def _due(done: int, interval: int | None, last: int) -> bool:
    return done == last or (interval is not None and done % interval == 0)


def _report(session: Session, monitor: Monitor | None, result: StepResult, lr: float) -> None:
    """Bring together what all ranks know and hand it to the monitor; every rank must call this."""
    done = session.state.iteration
    loss = float(result.loss)
    experts = session.expert_statistics(steps=done - session.reported)
    memory = session.peak_memory()
    session.reported = done
    if monitor is not None:
        z_loss = float(result.output_z_loss) if session.run.model.output_z_loss_coeff else None
        consumed = session.state.consumed_samples
        monitor.step(StepReport(done, loss, lr, result.grad_norm, consumed, memory, experts, z_loss))
