#!/usr/bin/env python
"""Test every node of a run before it trains: a table of all ranks, and the bad node by name (exit code 2).

TOOL=tools/preflight.py launch/torchrun.sh RUN.yaml         as launch/torchrun.sh starts training, on each node
torchrun --nproc-per-node 8 tools/preflight.py RUN.yaml
python tools/preflight.py RUN.yaml                          this machine alone, where the layout is of one process

Looked at on each rank: GPU there and healthy (memory errors, slowed down by heat, clocks), memory in use, the rate of
matrix products; the rate of each of the run's groups (TP, CP, EP and DP by all-reduce, PP from stage to stage), all
groups of a kind at once; on each node the rate of the disk where checkpoints go, and whether all see the same folder;
code, libraries, configuration, data and clock the same everywhere. What makes a node bad stands under the table; one
that fails or hangs in the test is named too. Jobs of tools/launch.py run this first. (What is wrong with the run
itself, `tools/train.py RUN.yaml --check` says.)
"""

import sys
import time
from dataclasses import replace
from typing import TYPE_CHECKING

from megatron_ext.command import run_command, run_parser
from megatron_ext.config import RunConfig, load_run
from megatron_ext.config.load import read_run_text
from megatron_ext.monitoring.refused import alerting_of_refusal

if TYPE_CHECKING:
    import torch

    from megatron_ext.runtime.liveness import Liveness

_MOST_MINUTES = 10.0
"""For the whole test: a node that hangs in it is ended then."""


def main() -> None:
    """Parse the command line, test, and judge."""
    arguments = run_parser(__doc__).parse_args()
    from megatron_ext.launcher import adopt_launcher, end_with_launcher
    from megatron_ext.roll_call import on_every_rank

    adopt_launcher()
    end_with_launcher()
    with alerting_of_refusal(lambda: read_run_text(arguments.run, arguments.overrides).values):
        run = on_every_rank("configuration", lambda: load_run(arguments.run, arguments.overrides))
        from megatron_ext.training.watch import watching

        limits = run.runtime.watchdog
        limits = replace(limits, first_step_minutes=min(_MOST_MINUTES, limits.first_step_minutes))
        with watching(run, limits, "leave its node out (sbatch --exclude), or mend it") as others:
            _test(run, others)


def _test(run: RunConfig, others: "Liveness") -> None:
    import torch.distributed as dist

    from megatron_ext.errors import EnvironmentFault
    from megatron_ext.launcher import launched_rank
    from megatron_ext.launching.node_report import RULE, bad_nodes, table
    from megatron_ext.launching.node_test import measure_all
    from megatron_ext.roll_call import on_every_rank
    from megatron_ext.runtime.logs import setup_logging
    from megatron_ext.runtime.process_groups import end_process_groups, split_process_group, start_process_group
    from megatron_ext.training.same_everywhere import require_same_run

    setup_logging(launched_rank())
    with others.speaking():
        device = on_every_rank("node", lambda: _prepared(run), run.runtime.distributed_timeout_minutes)
    start_process_group(run.runtime, device, on_failure=others.end_if_missing)
    others.met()
    require_same_run(run)  # ranks of other layouts would wait for each other
    split_process_group(run.parallel, run.runtime)
    reports = measure_all(run, device, others)
    others.end()
    bad = bad_nodes(reports)
    if dist.get_rank() == 0:
        print(*table(reports), RULE, sep="\n")
    dist.barrier()
    end_process_groups()
    if bad and launched_rank() != 0:
        time.sleep(5)  # rank 0 speaks, and a launcher ends all once one has ended
        sys.exit(2)
    if bad:
        names = ", ".join(dict.fromkeys(one.host for one in bad))
        reasons = "\n".join(f"  {one.host}: {one.why}" for one in bad)
        raise EnvironmentFault(f"not fit to train: {names}\n{reasons}\nLeave it out (sbatch --exclude), or mend it")
    if launched_rank() == 0:
        ranks = "1 rank" if len(reports) == 1 else f"{len(reports)} ranks"
        print(f"fit to train: {ranks}, on {', '.join(dict.fromkeys(report.host for report in reports))}")


def _prepared(run: RunConfig) -> "torch.device":
    """This rank's device, once the layout fits."""
    from megatron_ext.launcher import launched_world_size
    from megatron_ext.runtime.device import choose_device

    run.resolve(launched_world_size())
    return choose_device(run.runtime)


if __name__ == "__main__":
    run_command(main)
