"""The recipes of examples/recipes, each with the number of processes that it is for."""

import re

from megatron_ext.config import RunConfig, load_run, smallest_world_size
from tests.support.workspace import ROOT

FOLDER = ROOT / "examples" / "recipes"
NAMES = [path.stem for path in sorted(FOLDER.glob("*.yaml"))]


def recipe(name: str) -> tuple[RunConfig, int]:
    """The run, and the first --world-size in its comment: without one the fewest processes that its layout takes."""
    path = FOLDER / f"{name}.yaml"
    run, named = load_run(path), re.search(r"--world-size (\d+)", path.read_text())
    return run, int(named[1]) if named else smallest_world_size(run.parallel)
