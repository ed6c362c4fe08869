"""Results of evaluations that people start by hand, kept beside a run's checkpoints, where reports find them."""

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_ext.errors import DataError
from megatron_ext.files import read_json_object

log = logging.getLogger(__name__)

FOLDER = "evaluation"
"""Of the checkpoint directory: what evaluations leave, a folder for each checkpoint."""
_CHECKPOINT = re.compile(r"iter_(\d{7,})")
METRICS = "metrics"
"""The key of a kept file under which its numbers stand, by name."""


def evaluation_folder(checkpoint: Path) -> Path:
    """Where the evaluations of a checkpoint keep what they leave."""
    return checkpoint.parent / FOLDER / checkpoint.name


def kept_results(directory: Path) -> dict[int, dict[str, float]]:
    """What is kept beside the checkpoints in `directory`, by step; a damaged file is passed over with a warning."""
    found: dict[int, dict[str, float]] = {}
    for path in sorted((directory / FOLDER).glob("iter_*/*.json")):
        if not (step := _CHECKPOINT.fullmatch(path.parent.name)):
            continue
        try:
            content: Mapping[str, Any] = read_json_object(path, DataError)
        except DataError as error:
            # Lists of samples lie there too; who wrote something else must know why it is not shown.
            if "expected a JSON object" not in str(error):
                log.warning("%s; it is left out", error)
            continue
        if isinstance(metrics := content.get(METRICS), dict):
            found.setdefault(int(step[1]), {}).update(metrics)
    return dict(sorted(found.items()))
