"""The training loop."""

import contextlib
import logging
from dataclasses import replace

import torch.distributed as dist

from megatron_ext.config import RunConfig
from megatron_ext.mcore.optimizer import set_learning_rate
from megatron_ext.monitoring.monitor import Monitor, StepReport
from megatron_ext.runtime import accelerators
from megatron_ext.runtime.device import choose_device
from megatron_ext.runtime.logs import setup_logging
from megatron_ext.runtime.process_groups import (
    end_process_groups,
    launched_rank,
    launched_world_size,
    split_process_group,
    start_process_group,
)
from megatron_ext.training.banner import banner
from megatron_ext.training.preflight import examine_run
from megatron_ext.training.schedule import learning_rate
from megatron_ext.training.session import RunData, Session, open_session, starting_state
from megatron_ext.training.step import StepResult

log = logging.getLogger(__name__)


def train(run: RunConfig, source: str = "the run") -> None:
    """Run, or continue, the training that `run` describes, as one of the processes the launcher started.

    Args:
        source: where the run is from, for messages.
    """
    setup_logging(launched_rank())
    layout = run.resolve(launched_world_size())
    accelerators.require(run.runtime, run.precision, has_experts=run.model.is_moe)
    found = examine_run(run, source) if launched_rank() == 0 else None
    device = choose_device(run.runtime)
    start_process_group(run.runtime, device)
    groups = split_process_group(run.parallel, run.runtime)
    # The data first: what is wrong with it is said before minutes go into building the model.
    data = RunData(run, starting_state(run))
    session = open_session(run, layout, groups, device)
    session.state = replace(session.state, data=data.fingerprints)
    assert session.state.wandb_run_id is not None
    is_reporter = dist.get_rank() == 0
    monitor = Monitor(run, layout, session.state.iteration, session.state.wandb_run_id) if is_reporter else None
    for line in banner(run, layout, device, found) if found is not None else ():
        log.info(line)
    try:
        _train(session, data, monitor)
    except BaseException:
        # No collective after a failure: another rank may never join it.
        if monitor is not None:
            monitor.close(failed=True)
        raise
    if monitor is not None:
        monitor.close()
    end_process_groups()


def _train(session: Session, data: RunData, monitor: Monitor | None) -> None:
    run = session.run
    last = min(run.train.train_iters, run.train.stop_at_iteration or run.train.train_iters)
    if session.state.iteration >= last:
        log.info("nothing to do: %d of %d steps are done", session.state.iteration, run.train.train_iters)
        return
    for batch in data.train(session):
        lr = learning_rate(run, session.state.iteration)
        set_learning_rate(session.optimizer, lr)
        result = session.step(batch)
        done = session.state.iteration
        if _due(done, run.logging.log_interval, last):
            _report(session, monitor, result, lr)
        with monitor.clock_stopped() if monitor is not None else contextlib.nullcontext():
            if run.train.eval_interval is not None and _due(done, run.train.eval_interval, last):
                _validate(session, data, monitor)
            if _due(done, run.checkpoint.save_interval, last):
                log.info("saved %s", session.save())
        if done == last:
            break


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
