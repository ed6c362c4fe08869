"""Where an upcycling writes, and whether it may: found before hours of work show it."""

from pathlib import Path

from megatron_ext.errors import ConversionError
from megatron_ext.model_io.recipe import recipe_path, require_recipe_place
from megatron_ext.model_io.write import Output, Progress, require_place
from megatron_ext.upcycling.plan import UpcyclePlan


def output_of(plan: UpcyclePlan, progress: Progress = lambda done, total: None) -> Output:
    """Where and how the model is written."""
    options = plan.options
    return Output(Path(options.target), workers=options.workers, force=options.force, progress=progress)


def recipe_of(plan: UpcyclePlan) -> Path | None:
    """The training configuration beside a Megatron checkpoint."""
    return recipe_path(plan.options.target) if plan.options.to == "megatron" else None


def require_places(plan: UpcyclePlan) -> None:
    """Raise ConversionError where the target, or a file beside it, may not be written."""
    require_place(plan.options.to, output_of(plan), [checkpoint.directory for checkpoint in plan.checkpoints])
    recipe, figures = recipe_of(plan), plan.options.figures
    if recipe is not None:
        require_recipe_place(recipe, force=plan.options.force)
    if figures is not None and Path(figures).is_dir():
        raise ConversionError(f"figures = {figures}: is a directory; name a file in it")


def obstacle(plan: UpcyclePlan) -> str | None:
    """Why the plan cannot be carried out as it is, if a place is taken."""
    try:
        require_places(plan)
    except ConversionError as error:
        return str(error)
    return None
