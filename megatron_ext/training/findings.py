"""What was found on this machine before a run starts, for its messages and for its banner."""

from dataclasses import dataclass, field
from functools import partial

from megatron_ext.config import DataConfig, RunConfig
from megatron_ext.data.stream.plan import RunPlan
from megatron_ext.planning.data_table import plan_table, plan_warnings
from megatron_ext.planning.epochs import SourceUse
from megatron_ext.training.schedule import learning_rate
from megatron_ext.training.schedule_faults import schedule_faults, schedule_warnings


@dataclass
class Findings:
    """What was found. Keys that are wrong themselves are left out: their fault is said already."""

    faults: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    changes: list[str] = field(default_factory=list)
    """Keys that were changed since the checkpoint that the run goes on from, as `key: old -> new`."""
    sources: list[SourceUse] = field(default_factory=list)
    """How often each source of data.train is read."""
    plan: RunPlan | None = None
    """Which stage each step belongs to."""
    stages: list[str] = field(default_factory=list)
    """A table of the stages and their sources."""
    packed: list[str] = field(default_factory=list)
    """What packing saves of each source."""
    start: str = ""
    """What the run starts from."""
    sums: str = ""
    """How the files of the data were compared with what was written."""
    room: str = ""
    """What its checkpoints take of the disk."""

    def note_plan(self, plan: RunPlan, data: DataConfig, run: RunConfig | None) -> None:
        """Keep the plan of `data`, say what people would look at where it has stages, and what its schedule lacks."""
        self.plan, rate_at = plan, None
        if run is not None:
            wrong = schedule_faults(run, plan)
            self.faults += wrong
            if not wrong:
                rate_at = partial(learning_rate, run, plan)
                self.warnings += schedule_warnings(run, plan)
        if data.stages:
            self.stages = plan_table(plan, rate_at)
            self.warnings += plan_warnings(plan, data)

    def lines(self) -> list[str]:
        """For people."""
        return [
            *(
                f"data            {line}"
                for line in [*self.stages, *(use.line() for use in self.sources), *self.packed]
            ),
            *([f"data            {self.sums}"] if self.sums else []),
            *([f"start           {self.start}"] if self.start else []),
            *(f"changed         {change}" for change in self.changes),
            *([f"checkpoints     {self.room}"] if self.room else []),
            *(f"warning         {warning}" for warning in self.warnings),
        ]
