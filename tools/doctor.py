#!/usr/bin/env python
"""What is installed here, what it makes fast, what is missing and why, and which faults of megatron-core are answered.

  python tools/doctor.py
  srun -N1 -n1 --gpus=8 python tools/doctor.py --brief         # the node that trains, not the one you log in to

Exit code 0 if training can run here, 2 if not.
"""

from megatron_ext.command import parse_command, run_command
from megatron_ext.config.base import config


@config
class DoctorOptions:
    """Options of this command."""

    brief: bool = False
    """Leave out the faults of megatron-core."""


def main() -> None:
    """Parse the command line and print the report."""
    o = parse_command(DoctorOptions, __doc__)
    from megatron_ext.errors import EnvironmentFault
    from megatron_ext.runtime.doctor import examine

    report = examine()
    for title, rows in report.sections:
        if o.brief and title.startswith("Known faults"):
            continue
        print(title)
        width = max(len(name) for name, _ in rows)
        for name, finding in rows:
            print(f"  {name:{width}}  {finding}")
        print()
    if report.fault is not None:
        raise EnvironmentFault(report.fault)
    print("training can run here")


if __name__ == "__main__":
    run_command(main)
