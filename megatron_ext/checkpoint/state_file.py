"""What a checkpoint has of its run beside the tensors: `state.json` (scalars) and `rng.pt` (random states, by rank)."""

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from megatron_ext.checkpoint.integrity import require_whole_file
from megatron_ext.errors import CheckpointError
from megatron_ext.files import read_json_object, write_bytes, write_text
from megatron_ext.foreign import reading

STATE_FILE, RNG_FILE = "state.json", "rng.pt"
BASE_KEY = "base"
"""Under this `state.json` says beside which weights the adapters of a checkpoint were trained that holds no others:
{path, fingerprint, adapters: their configuration}."""
_COUNTS = ("iteration", "consumed_samples", "optimizer_steps")


@dataclass(frozen=True)
class TrainingState:
    """Where a run stands."""

    iteration: int = 0
    """Optimizer steps done."""
    consumed_samples: int = 0
    """Sequences consumed: the position in the data."""
    optimizer_steps: int = 0
    """Steps Adam has counted; fewer than `iteration` where the optimizer was started afresh."""
    data: tuple[str, ...] = ()
    """Fingerprints of the training sources, in which `consumed_samples` is a position."""
    plan: Mapping[str, Any] | None = field(default=None, hash=False)
    """What was read, stage by stage and source by source; None where the order of samples is by an index (order 1)."""


UNTRAINED: Mapping[str, Any] = {
    **{name: 0 for name in _COUNTS},
    "data": [],
    "wandb_run_id": None,  # older versions ask for it
}
"""The scalars of weights that no run has trained."""


def read_state(checkpoint: Path) -> TrainingState:
    """Where the run stood that saved `checkpoint`.

    Raises:
        CheckpointError: `state.json` is missing or changed, or says something else than that.
    """
    raw = read_scalars(checkpoint)
    return TrainingState(**{name: raw[name] for name in _COUNTS}, data=tuple(raw["data"]), plan=raw.get("plan"))


def read_scalars(checkpoint: Path) -> dict[str, Any]:
    """Everything that `state.json` says, of which what every checkpoint must say is looked at.

    Raises:
        CheckpointError: as `read_state`.
    """
    path = checkpoint / STATE_FILE
    require_whole_file(checkpoint, STATE_FILE)
    with reading(path, CheckpointError, advice="it is not a training state of this framework"):
        raw = read_json_object(path, CheckpointError)
        for name in _COUNTS:
            if type(count := raw[name]) is not int or count < 0:
                raise ValueError(f"{name} is {count!r}")
        if not isinstance(raw["data"], list) or not all(isinstance(name, str) for name in raw["data"]):
            raise ValueError("data must be a list of names")
        if not isinstance(raw.get("plan"), dict | None):
            raise ValueError("plan must be a mapping")
    return raw


def holds_adapters(checkpoint: Path) -> bool:
    """Whether `checkpoint` holds adapters alone, and not the weights beside which they are."""
    return (checkpoint / STATE_FILE).is_file() and read_scalars(checkpoint).get(BASE_KEY) is not None


def require_whole_model(checkpoint: Path) -> None:
    """Raise CheckpointError where `checkpoint` holds adapters alone."""
    if holds_adapters(checkpoint):
        base = read_scalars(checkpoint)[BASE_KEY]
        raise CheckpointError(
            f"{checkpoint}: holds adapters alone, of the weights of {base['path']}; merge both first: "
            f"python tools/merge_lora.py {checkpoint} TARGET"
        )


def write_scalars(checkpoint: Path, scalars: Mapping[str, Any]) -> None:
    """Write `state.json`."""
    write_text(checkpoint / STATE_FILE, json.dumps(scalars, indent=2) + "\n")


def read_random_state(checkpoint: Path, rank: int) -> dict[str, Any] | None:
    """The random states that `rank` saved; None if there was none, or no training made the checkpoint."""
    path = checkpoint / RNG_FILE
    if not path.is_file():
        return None
    require_whole_file(checkpoint, RNG_FILE)
    with reading(path, CheckpointError, advice="without it, removed, training goes on with fresh random numbers"):
        states = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(states, list) or not all(isinstance(state, dict | None) for state in states):
            raise ValueError("not the random states of a run")
    return states[rank] if rank < len(states) else None


def write_random_states(checkpoint: Path, states: Sequence[dict[str, Any] | None]) -> None:
    """Write the random state of every rank."""
    write_saved(checkpoint / RNG_FILE, list(states))


def write_saved(path: Path, content: Any) -> None:
    """torch.save, which would say nothing useful of a full disk."""
    write_bytes(path, saved_bytes(content))


def saved_bytes(content: Any) -> bytes:
    """What torch.save writes."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def read_saved(content: bytes) -> Any:
    """The other way: plain values and tensors."""
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
