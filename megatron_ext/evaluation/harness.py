"""lm-evaluation-harness on an opened model, through its own API, with tasks and data of this machine alone."""

import json
import logging
import math
import os
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_ext.errors import ConfigError, DataError, EnvironmentFault
from megatron_ext.evaluation.harness_options import HarnessOptions
from megatron_ext.files import read_json_object, write_text
from megatron_ext.foreign import fault_of, reading
from megatron_ext.locks import exclusive_output
from megatron_ext.monitoring.kept_results import METRICS, evaluation_folder
from megatron_ext.monitoring.report.evaluations import INTERVAL

if TYPE_CHECKING:  # torch; what is below must be said before the hub's library is imported
    from megatron_ext.generation.text_model import TextModel

log = logging.getLogger(__name__)

RESULTS_FILE = "lm_eval.json"
"""In the folder of an evaluation: the metrics, and what the harness says of each time that it was run."""
_RUNS = "runs"
_NO_FILTER = "none"
_PATIENCE = 60.0
"""Seconds that another process has for its scores: a file of a few megabytes, on a slow shared disk."""
_HALF_95 = 1.96
_DATA_HERE = (
    "the data set of a task is read from this machine: give dataset_path: json and dataset_kwargs: {data_files: ...} "
    "in its YAML, or fetch it with --online"
)


def stay_offline() -> None:
    """Let the hub's libraries fetch nothing. Said before they are imported: they read it once."""
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
        os.environ[name] = "1"


def require_harness() -> None:
    """Raise where lm-evaluation-harness is not installed, before a model is opened.

    Raises:
        EnvironmentFault: it says how to install it.
    """
    try:
        import lm_eval.evaluator
        import lm_eval.models.huggingface  # noqa: F401
    except ImportError as error:
        lacking = (error.name or "lm_eval").split(".")[0]
        missing = "" if lacking == "lm_eval" else f" ({lacking} is missing)"
        raise EnvironmentFault(
            f"this needs lm-evaluation-harness{missing}: pip install lm-eval (or megatron-ext[lm-eval])"
        ) from error


def kept_place(model: str | Path) -> Path:
    """The file that keeps the scores of `model`: in the run's folder of evaluations, or beside an export."""
    from megatron_ext.checkpoint.find import require_checkpoint  # torch, and what asks the hub
    from megatron_ext.model_io.open import is_hugging_face

    if is_hugging_face(model):
        directory = Path(model).resolve()
        return directory.with_name(f"{directory.name}.{RESULTS_FILE}")
    return evaluation_folder(require_checkpoint(model).absolute()) / RESULTS_FILE


def evaluate(model: "TextModel", tasks: "Tasks", asked: HarnessOptions) -> dict[str, Any]:
    """What the harness finds, as its own `simple_evaluate` returns it, without the samples.

    The network is the opened one, in fp32, its tokenizer the model's own: nothing is loaded a second time.

    Raises:
        DataError: the harness failed in a task.
    """
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    network = HFLM(pretrained=model.network, tokenizer=model.tokenizer, batch_size=asked.batch_size)
    try:
        found = simple_evaluate(
            model=network,
            tasks=list(tasks.loaded),
            task_manager=tasks.manager,
            num_fewshot=asked.num_fewshot,
            limit=asked.documents,
            apply_chat_template=asked.chat,
            log_samples=False,
            **dict.fromkeys(("random_seed", "numpy_random_seed", "torch_random_seed"), asked.seed),
            fewshot_random_seed=asked.seed,
        )
    except Exception as fault:
        # Its templates, filters and functions of tasks raise whatever they like.
        log.debug("%s", traceback.format_exc())
        raise DataError(
            f"tasks = {', '.join(asked.tasks)}: lm-evaluation-harness failed: {type(fault).__name__}: {fault_of(fault)}"
        ) from fault
    assert found is not None  # None is for ranks other than the first
    return dict(found)


@dataclass(frozen=True)
class Tasks:
    """What is asked of a model."""

    manager: Any
    """The harness's, of tasks."""
    loaded: Sequence[Any]
    """Its tasks and groups of them, with their data."""


def read_tasks(asked: Sequence[str]) -> Tasks:
    """Load tasks by their files, folders and names, with their data.

    Raises:
        ConfigError: there is no such task.
        DataError: a task or its data cannot be read.
    """
    from lm_eval.tasks import TaskManager

    # It warns of each setting of a task, and later of a network that is given to it.
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    paths = {name: Path(name) for name in asked if Path(name).exists()}
    folders = [path if path.is_dir() else path.parent for path in paths.values()]
    with reading(asked[0], DataError, kind="tasks of lm-evaluation-harness"):
        manager = TaskManager(include_path=[str(one) for one in folders], include_defaults=False)
        # Its own ten thousand files take long, and are looked through only where one of its own names is asked for.
        if any(name not in paths and name not in manager.all_tasks for name in asked):
            manager = TaskManager(include_path=[str(one) for one in folders])
    wanted: list[str] = []
    for name in asked:
        if name not in paths:
            if name not in manager.all_tasks:
                raise ConfigError(
                    f"tasks = {name!r}: neither a YAML file or folder here, nor a task that lm-evaluation-harness has "
                    "(python -m lm_eval ls tasks)"
                )
            wanted.append(name)
        elif paths[name].is_dir():
            here = TaskManager(include_path=str(paths[name]), include_defaults=False).all_subtasks
            if not here:
                raise DataError(f"{name}: holds no YAML of a task of lm-evaluation-harness")
            wanted += here
        else:
            wanted.append(str(paths[name].resolve()))
    loaded: list[Any] = []
    for name in wanted:
        with reading(name, DataError, kind="a task of lm-evaluation-harness", advice=_DATA_HERE):
            built = manager.load([name])
            loaded += [*built.get("groups", {}).values()] or [*built["tasks"].values()]
    return Tasks(manager, loaded)


def metrics_of(found: Mapping[str, Any]) -> dict[str, float]:
    """Numbers by name: TASK/METRIC, with a filter that is not the usual TASK/METRIC/FILTER, and half of its interval.

    The interval is 1.96 times the harness's standard error, where it has one.
    """
    numbers: dict[str, float] = {}
    for task, values in found["results"].items():
        for key, value in values.items():
            metric, _, chosen = key.partition(",")
            if not chosen or isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                continue
            is_error = metric.endswith("_stderr")
            name = "/".join([task, metric.removesuffix("_stderr"), *([chosen] if chosen != _NO_FILTER else [])])
            numbers[name + INTERVAL if is_error else name] = _HALF_95 * value if is_error else float(value)
    return numbers


def keep(path: Path, model: str, found: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
    """Write `metrics` and what the harness says to `path`, beside what other tasks have left there.

    Another process that does so at the same time is waited for: each reads what the other has written.

    Raises:
        DataError: there is a file of something else.
        MegatronExtError: another process does not come to an end with it.
    """
    with exclusive_output(path, "keeping scores", _PATIENCE):
        before: dict[str, Any] = {METRICS: {}, _RUNS: []}
        if path.is_file():
            before = read_json_object(path, DataError)
            if not isinstance(before.get(METRICS), dict) or not isinstance(before.get(_RUNS), list):
                raise DataError(
                    f"{path}: not written by tools/evaluate.py lm-eval; move it away, or give another --output"
                )
        runs = [*before[_RUNS], {"model": model, "dtype": "float32", **found}]
        content = {METRICS: {**before[METRICS], **metrics}, _RUNS: runs}
        write_text(path, json.dumps(content, indent=2, ensure_ascii=False, default=str) + "\n")
