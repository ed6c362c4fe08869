"""A whole upcycling as its command line does it: routers, model, function check, training configuration, figures."""

import json
from dataclasses import dataclass
from pathlib import Path

from megatron_ext.architectures.registry import architecture_for
from megatron_ext.conversion.text import comparison_batches
from megatron_ext.conversion.verify import require_memory
from megatron_ext.conversion.write import Examined, Output, Progress, Written, require_place
from megatron_ext.errors import ConversionError
from megatron_ext.files import write_text
from megatron_ext.upcycling.activations import clustered_routers
from megatron_ext.upcycling.check import FunctionCheck, function_check
from megatron_ext.upcycling.recipe import recipe_path, training_recipe
from megatron_ext.upcycling.upcycle import Plan, drawn_routers, output_of, write


@dataclass(frozen=True)
class Upcycled:
    """What was made."""

    written: Written
    function: FunctionCheck | None
    """None where logits were not to be compared."""
    recipe: Path | None
    """The training configuration beside a Megatron checkpoint."""


def upcycle(plan: Plan, progress: Progress = lambda done, total: None) -> Upcycled:
    """Make the model of `plan` and all that belongs to it.

    Raises:
        ConfigError, DataError, ConversionError, CheckpointError: nothing that looks complete is left behind.
    """
    options, output = plan.options, output_of(plan, progress)
    recipe = recipe_path(plan) if options.to == "megatron" else None
    text = training_recipe(plan) if recipe is not None else ""
    _require_what_it_takes(plan, output, recipe)
    router_of = clustered_routers(plan) if options.router_init == "activations" else drawn_routers(plan)
    source = plan.opened[0].directory
    batches = comparison_batches(source, options.text, options.tokenizer) if options.logits else []
    function: list[FunctionCheck] = []

    def check(partial: Path) -> Examined | None:
        if not options.logits:
            return None
        function.append(function_check(plan, partial, batches))
        return Examined(function[0].lines())

    written = write(plan, router_of, check, output)
    if recipe is not None:
        write_text(recipe, text)
    if options.figures and function:
        write_text(options.figures, json.dumps({"upcycling": function[0].figures()}, indent=2) + "\n")
    return Upcycled(written, function[0] if function else None, recipe)


def _require_what_it_takes(plan: Plan, output: Output, recipe: Path | None) -> None:
    """Raise ConversionError where the target is taken or memory is short, before hours of work show it."""
    if recipe is not None and recipe.exists() and not plan.options.force:
        raise ConversionError(f"{recipe} exists; choose another target or pass --force to replace it")
    require_place(plan.options.to, output, [opened.directory for opened in plan.opened])
    if plan.options.to == "hf":
        architecture_for(plan.moe)
    if plan.options.logits:
        require_memory(plan.moe, plan.options.target)
