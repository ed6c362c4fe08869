"""A whole upcycling as its command line does it: routers, model, function check, training configuration, figures."""

import json
from dataclasses import dataclass
from pathlib import Path

from megatron_ext.conversion.text import comparison_batches
from megatron_ext.conversion.write import Progress, Written
from megatron_ext.errors import ConversionError
from megatron_ext.files import write_text
from megatron_ext.upcycling.activations import clustered_routers
from megatron_ext.upcycling.check import FunctionCheck, function_check
from megatron_ext.upcycling.recipe import recipe_path, training_recipe
from megatron_ext.upcycling.upcycle import Plan, drawn_routers, write


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
    options = plan.options
    recipe = recipe_path(plan) if options.to == "megatron" else None
    if recipe is not None and recipe.exists() and not options.force:
        raise ConversionError(f"{recipe} exists; choose another target or pass --force to replace it")
    source = plan.opened[0].directory
    batches = comparison_batches(source, options.text, options.tokenizer) if _needs_text(plan) else []
    router_of = clustered_routers(plan, batches) if options.router_init == "activations" else drawn_routers(plan)
    function: list[FunctionCheck] = []

    def check(partial: Path) -> None:
        if options.logits:
            function.append(function_check(plan, partial, batches))

    written = write(plan, router_of, check, progress)
    if recipe is not None:
        write_text(recipe, training_recipe(plan))
    if options.figures and function:
        write_text(options.figures, json.dumps({"upcycling": function[0].figures()}, indent=2) + "\n")
    return Upcycled(written, function[0] if function else None, recipe)


def _needs_text(plan: Plan) -> bool:
    return plan.options.logits or plan.options.router_init == "activations"
