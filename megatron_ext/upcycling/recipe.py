"""A training configuration for an upcycled model, with what the papers recommend as comments."""

import logging
import textwrap
from dataclasses import fields, replace
from typing import Any

from megatron_ext.config import ModelConfig, RunConfig, dump_yaml, load_config, to_mapping
from megatron_ext.config.load import fields_of
from megatron_ext.errors import ConfigError
from megatron_ext.upcycling.places import RECIPE_HEAD, recipe_path
from megatron_ext.upcycling.plan import Plan

log = logging.getLogger(__name__)

_AUX_LOSS = 1e-2
_UNKNOWN: dict[str, Any] = {
    "precision": {"kind": "bf16"},
    "train": {"train_iters": 10000, "global_batch_size": 1024, "micro_batch_size": 1},
    "optimizer": {"kind": "adam", "lr": 3e-4},
}
"""What a Hugging Face directory does not say about its training."""

_COMMENTS = {
    "model:": [
        "A balance loss of 1e-2 to 1e-3 did well for upcycled models (He et al. 2024, arXiv 2410.07524, section 4;",
        "Drop-Upcycling, arXiv 2502.19261, took 2e-2); a router z-loss made no difference there.",
    ],
    "parallel:": ["python tools/prove.py FILE.yaml shows on a CPU that a layout trains like one process."],
    "train:": [
        "Batches of about 4M tokens did better than 2M and 32M (arXiv 2410.07524, section 4).",
    ],
    "optimizer:": [
        "Back to the peak learning rate of pretraining (arXiv 2410.07524, section 4): going on with its last, small",
        "one leaves experts close to each other. Komatsuzaki et al. 2022 (arXiv 2212.05055) went on with the schedule.",
    ],
}


def training_recipe(plan: Plan) -> str:
    """YAML of a run that trains the upcycled model from step 0, made of the source's own run where it has one."""
    target, source = plan.options.target, plan.opened[0].run
    raw = {name: source[name] for name in RunConfig.__dataclass_fields__ if name in source}
    raw = {**_defaults(plan), **raw} if "train" in raw else _defaults(plan)
    raw["model"] = to_mapping(_balanced(plan.moe))
    raw["schedule"] = _rewarmed(raw)
    raw["checkpoint"] = {**raw.get("checkpoint", {}), "directory": f"{target}-trained", "initialize_from": target}
    run, comments = _trainable(raw)
    return _commented(dump_yaml(_without_defaults(run)), plan, comments, from_run="train" in source)


def _trainable(raw: dict[str, Any]) -> tuple[RunConfig, dict[str, str]]:
    """The run, without what a dense run may have and a MoE run may not; and a comment on each section that changed."""
    try:
        return load_config(RunConfig, raw, source="the source's run"), {}
    except ConfigError as error:
        fault = error
    sequence_parallel = {"parallel": {**raw.get("parallel", {}), "sequence_parallel": True}}
    parallel: dict[str, Any] = {"parallel": {}}
    precision = {"precision": _UNKNOWN["precision"]}
    for change in (
        sequence_parallel,
        parallel,
        precision,
        {**sequence_parallel, **precision},
        {**parallel, **precision},
    ):
        try:
            run = load_config(RunConfig, {**raw, **change}, source="the source's run")
        except ConfigError:
            continue
        comments = {
            f"{section}:": f"The dense model's run has {raw.get(section)}, with which this one is refused: {fault}"
            for section in change
        }
        for section, comment in comments.items():
            log.warning("the training configuration changes %s %s", section, comment)
        return run, comments
    raise fault


def _defaults(plan: Plan) -> dict[str, Any]:
    data = {
        "sequence_length": min(plan.moe.max_position_embeddings, 4096),
        "tokenizer": str(plan.opened[0].tokenizer or "TOKENIZER"),
        "cache_dir": f"{plan.options.target}-cache",
        "train": [{"path": "DATA/train"}],
    }
    return {**_UNKNOWN, "data": data, "checkpoint": {"save_interval": 1000}}


def _balanced(moe: ModelConfig) -> ModelConfig:
    if not moe.is_moe or moe.moe_router_enable_expert_bias or any(moe.balance_losses.values()):
        return moe
    return replace(moe, moe_aux_loss_coeff=_AUX_LOSS)


def _rewarmed(raw: dict[str, Any]) -> dict[str, Any]:
    """A cosine from the peak to a tenth of it, after a warmup of a hundredth of the run."""
    steps, peak = raw["train"]["train_iters"], raw["optimizer"]["lr"]
    return {"kind": "cosine", "warmup_iters": max(steps // 100, 1), "min_lr": peak / 10}


def _without_defaults(section: Any) -> dict[str, Any]:
    """The configuration as a person would write it: what is not at its default, and every `kind`."""
    known = fields_of(type(section))
    result: dict[str, Any] = {}
    for name in (field.name for field in fields(section)):
        value, info = getattr(section, name), known[name]
        if name != "kind" and not info.is_required() and value == info.get_default(call_default_factory=True):
            continue
        result[name] = _plain(value)
    return result


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return _without_defaults(value) if hasattr(value, "__dataclass_fields__") else value


def _commented(text: str, plan: Plan, changes: dict[str, str], *, from_run: bool) -> str:
    where = "the dense model's run" if from_run else "what the papers did; fill in data.train, and your own batches"
    made = f"upcycled by {plan.method.kind}" if plan.adds_experts else "deepened"
    header = [
        f"{RECIPE_HEAD}{plan.options.target}, {made}. Made from {where}.",
        f"#   torchrun --nproc-per-node N tools/train.py {recipe_path(plan)}",
    ]
    comments = _COMMENTS if plan.adds_experts else {}
    lines: list[str] = []
    for line in text.splitlines():
        lines += [f"# {comment}" for comment in comments.get(line, [])]
        lines += textwrap.wrap(changes.pop(line, ""), 110, initial_indent="# ", subsequent_indent="# ")
        lines.append(line)
    left = [wrapped for change in changes.values() for wrapped in textwrap.wrap(change, 110)]
    return "\n".join([*header, *(f"# {line}" for line in left), *lines]) + "\n"
