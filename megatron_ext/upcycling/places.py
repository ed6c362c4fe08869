"""Where an upcycling writes, and whether it may: found before hours of work show it."""

from pathlib import Path

from megatron_ext.conversion.write import Output, Progress, require_place
from megatron_ext.errors import ConversionError
from megatron_ext.upcycling.plan import Plan

RECIPE_HEAD = "# Trains "
"""How a training configuration of ours begins."""


def output_of(plan: Plan, progress: Progress = lambda done, total: None) -> Output:
    """Where and how the model is written."""
    options = plan.options
    return Output(Path(options.target), workers=options.workers, force=options.force, progress=progress)


def recipe_path(plan: Plan) -> Path | None:
    """The training configuration beside a Megatron checkpoint."""
    target = Path(plan.options.target)
    return target.with_name(target.name + ".yaml") if plan.options.to == "megatron" else None


def require_places(plan: Plan) -> None:
    """Raise ConversionError where the target, or a file beside it, may not be written."""
    require_place(plan.options.to, output_of(plan), [opened.directory for opened in plan.opened])
    recipe, figures = recipe_path(plan), plan.options.figures
    if recipe is not None and recipe.exists():
        if not plan.options.force:
            raise ConversionError(f"{recipe} exists; choose another target or pass --force to replace it")
        if not recipe.is_file() or not recipe.read_bytes().startswith(RECIPE_HEAD.encode()):
            raise ConversionError(
                f"{recipe} exists and is no training configuration that was made here: not replaced, even with --force"
            )
    if figures is not None and Path(figures).is_dir():
        raise ConversionError(f"figures = {figures}: is a directory; name a file in it")


def obstacle(plan: Plan) -> str | None:
    """Why the plan cannot be carried out as it is, if a place is taken."""
    try:
        require_places(plan)
    except ConversionError as error:
        return str(error)
    return None
