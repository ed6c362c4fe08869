"""A whole upcycling as its command line does it: routers, model, function check, training configuration, figures."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_ext.architectures.registry import architecture_for
from megatron_ext.files import write_text
from megatron_ext.model_io.compare import require_memory
from megatron_ext.model_io.text import comparison_batches
from megatron_ext.model_io.write import Examined, Progress, Written
from megatron_ext.upcycling.activations import clustered_routers
from megatron_ext.upcycling.check import FunctionCheck, function_check
from megatron_ext.upcycling.content import drawn_routers, write
from megatron_ext.upcycling.places import output_of, recipe_of, require_places
from megatron_ext.upcycling.plan import UpcyclePlan
from megatron_ext.upcycling.recipe import upcycling_recipe


@dataclass(frozen=True)
class Upcycled:
    """What was made."""

    written: Written
    function: FunctionCheck | None
    """None where logits were not to be compared."""
    recipe: Path | None
    """The training configuration beside a Megatron checkpoint."""
    notes: Sequence[str] = ()
    """What it has otherwise than the source's run."""


def upcycle(plan: UpcyclePlan, progress: Progress = lambda done, total: None) -> Upcycled:
    """Make the model of `plan` and all that belongs to it.

    Raises:
        ConfigError, DataError, ConversionError, CheckpointError: nothing that looks complete is left behind.
    """
    options, recipe = plan.options, recipe_of(plan)
    require_places(plan)
    if options.to == "hf":
        architecture_for(plan.moe)
    if options.logits:
        require_memory(plan.moe, options.target)
    training = upcycling_recipe(plan) if recipe is not None else None
    router_of = clustered_routers(plan) if options.router_init == "activations" else drawn_routers(plan)
    source = plan.checkpoints[0].directory
    batches = comparison_batches(source, options.text, options.tokenizer) if options.logits else []
    function: list[FunctionCheck] = []

    def check(partial: Path) -> Examined | None:
        if not options.logits:
            return None
        function.append(function_check(plan, partial, batches))
        return Examined(function[0].lines())

    written = write(plan, router_of, check, output_of(plan, progress))
    if recipe is not None and training is not None:
        write_text(recipe, training.text)
    if options.figures and function:
        write_text(options.figures, json.dumps({"upcycling": function[0].figures()}, indent=2) + "\n")
    return Upcycled(written, function[0] if function else None, recipe, training.notes if training else ())
