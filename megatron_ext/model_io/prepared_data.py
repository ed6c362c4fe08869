"""The run that a prepared dataset asks for: its task, batches and steps; for the configuration beside a checkpoint."""

from pathlib import Path
from typing import Any

from megatron_ext.data.dataset import DATASET_FILE, PREPARE_AGAIN
from megatron_ext.data.stream.packing import lengths_together
from megatron_ext.data.supervised import PIECES, TOKENIZER_FOLDER, Kind
from megatron_ext.errors import ConversionError, DataError
from megatron_ext.files import read_json_object
from megatron_ext.foreign import reading

_LONGEST_SEQUENCE = 4096
_TASKS: dict[Kind, tuple[dict[str, Any], float, float]] = {
    "text": ({"kind": "pretrain"}, 1.0, 1e-4),
    "chat": ({"kind": "sft"}, 3.0, 1e-5),
    "preference": ({"kind": "preference", "loss": "sigmoid", "beta": 0.1}, 1.0, 1e-6),
}
"""Of each kind of data: the task, epochs and the peak of the learning rate, as is usual for all weights."""
_WHOLES: dict[Kind, str] = {"preference": "pair (both answers, each with its prompt)"}
_BATCHES = (64, 32, 16, 8)
_WANTED_STEPS = 100
"""The largest batch is taken with which a run has so many steps, else the smallest."""


def sections_for(directory: str | Path, max_position_embeddings: int, tokenizer: Path | None) -> dict[str, Any]:
    """The sections of a run that trains on the dataset in `directory`, as tools/preprocess.py wrote it.

    Args:
        max_position_embeddings: tokens in a row that the model can read.
        tokenizer: the model's; conversations and pairs have their own beside them.

    Raises:
        ConversionError: it is no prepared dataset, or it has a sample that the model cannot read.
    """
    directory = Path(directory)
    path = directory / DATASET_FILE
    if not path.is_file():
        raise ConversionError(f"--data {directory}: has no {DATASET_FILE}; give what tools/preprocess.py wrote")
    said = read_json_object(path, ConversionError)
    with reading(path, DataError, kind="what tools/preprocess.py writes", advice=PREPARE_AGAIN):
        kind: Kind = said.get("kind", "text")
        task, epochs, rate = _TASKS[kind]
        train, has_validation = said["splits"]["train"], "validation" in said["splits"]
        tokens, longest = int(train["tokens"]), int(train.get("longest", 1))
        if kind == "preference":
            longest = int(lengths_together(str(directory / "train"), PIECES[kind]).max())
    length = min(max_position_embeddings, _LONGEST_SEQUENCE)
    if longest > length:
        raise ConversionError(
            f"--data {directory}: has a {_WHOLES.get(kind, 'sample')} of {longest:,} tokens, and the run reads "
            f"{length:,} at once; prepare it with --max-tokens {length // PIECES[kind]}"
        )
    rows = epochs * tokens / length
    batch = next((batch for batch in _BATCHES if rows / batch >= _WANTED_STEPS), _BATCHES[-1])
    steps = max(int(rows / batch), 1)
    name = directory.resolve().name
    data = {
        "sequence_length": length,
        "tokenizer": str(tokenizer or "TOKENIZER" if kind == "text" else directory / TOKENIZER_FOLDER),
        "sources": {name: {"path": str(directory / "train")}},
        "stages": [{"name": name, "take": {name: {"epochs": epochs}}}],
        **({"validation": [{"path": str(directory / "validation")}]} if has_validation else {}),
    }
    return {
        "task": task,
        "train": {
            "global_batch_size": batch,
            "micro_batch_size": 1,
            **({"eval_interval": max(steps // 10, 1), "eval_iters": 1} if has_validation else {}),
        },
        "optimizer": {"kind": "adam", "lr": rate, "weight_decay": 0.0},
        "schedule": {"kind": "cosine", "warmup_iters": max(steps // 30, 1), "min_lr": float(f"{rate / 10:.6g}")},
        "data": data,
        "checkpoint": {"save_interval": max(steps // 3, 1), "keep_last": 2},
    }
