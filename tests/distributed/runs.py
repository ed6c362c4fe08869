"""Parts of a run as functions for the process pool: train some steps, save, load, save again."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_ext.checkpoint.find import require_checkpoint
from megatron_ext.checkpoint.state_file import read_random_state
from megatron_ext.config import ModelConfig, ParallelConfig, RunConfig, load_config, to_mapping
from megatron_ext.data.stream.stream import BatchShape
from megatron_ext.model_io.starting_weights import open_hugging_face
from megatron_ext.runtime.device import choose_device
from megatron_ext.runtime.process_groups import split_process_group
from megatron_ext.testing.tiny import RandomStream
from megatron_ext.training.guard.guard import Guard
from megatron_ext.training.session import Session, open_session
from tests.unit.training.plans import plan_of_run

GLOBAL_BATCH = 8


@dataclass(frozen=True)
class Part:
    """A stretch of a run in one layout."""

    model: ModelConfig
    directory: Path
    parallel: ParallelConfig = ParallelConfig()
    precision: str | dict[str, Any] = "fp32"
    seed: int = 1234
    checkpoint: tuple[tuple[str, Any], ...] = ()
    sections: tuple[tuple[str, dict[str, Any]], ...] = ()
    """Keys of other sections of the run."""
    adapters: dict[str, Any] | None = None

    def run_config(self) -> RunConfig:
        raw = {
            "model": to_mapping(self.model),
            "parallel": to_mapping(self.parallel),
            "precision": {"kind": self.precision} if isinstance(self.precision, str) else self.precision,
            "adapters": self.adapters,
            "train": {"train_iters": 8, "global_batch_size": GLOBAL_BATCH, "seed": self.seed},
            "optimizer": {"kind": "adam", "lr": 1e-3},
            "schedule": {"kind": "constant"},
            # These parts are fed with random batches; the data section is only carried along.
            "data": {
                "sequence_length": 32,
                "tokenizer": "unused",
                "cache_dir": "unused",
                "train": [{"path": "unused"}],
            },
            "checkpoint": {"directory": str(self.directory), **dict(self.checkpoint)},
            "runtime": {"device": "cpu", "threads": 1},
        }
        for section, keys in self.sections:
            raw[section] = {**raw.get(section, {}), **keys}
        return load_config(RunConfig, raw, source="part")


def started_otherwise(part: Part) -> Part:
    """The same run with other initial weights, so that nothing can look loaded by accident."""
    return replace(part, model=replace(part.model, init_method_std=0.1))


@contextmanager
def open_part(part: Part, guard: Guard | None = None) -> Iterator[Session]:
    """A session of `part`; with `guard`, which judges its steps."""
    run = part.run_config()
    groups = split_process_group(run.parallel, run.runtime)
    device, layout = choose_device(run.runtime), run.resolve(dist.get_world_size())
    stream = RandomStream(BatchShape(GLOBAL_BATCH, 1, groups.dp.rank(), groups.dp.size()), device)
    judged = {} if guard is None else {"guard": guard, "hooks": [guard]}
    session = open_session(
        run, layout, groups, device, stream, plan_of_run(run), open_foreign=open_hugging_face, **judged
    )
    if guard is not None:
        guard.on_start(session)
    yield session
    session.close()


def train_steps(session: Session, until: int) -> list[tuple[float, float]]:
    """Train to step `until`; return (loss, gradient norm) of each step."""
    results = []
    while session.state.iteration < until:
        result = session.step(session.stream.next())
        results.append((float(result.loss), result.grad_norm))
    return results


def train_and_save(part: Part, until: int, save: bool = True) -> list[tuple[float, float]]:
    """Train on from the checkpoint of `part`, if there is one."""
    with open_part(part) as session:
        results = train_steps(session, until)
        if save:
            session.save()
    return results


def load_and_save_to(part: Part, target: Path) -> None:
    """Load the newest checkpoint of `part` and save it, as it is, below `target`."""
    with open_part(part) as session:
        session.checkpoints.directory = target
        session.save()


def resumed_random_states(part: Part) -> tuple[bool, Any]:
    """Resume; return whether this rank's generator stands where the checkpoint says."""
    with open_part(part):
        checkpoint = require_checkpoint(part.directory)
        saved = read_random_state(checkpoint, dist.get_rank())
        assert saved is not None
        return torch.equal(saved["torch"], torch.get_rng_state()), saved["torch"].sum().item()
