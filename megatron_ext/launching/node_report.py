"""What the test of the nodes found on each rank, the rule by which a node is bad, and the table of all of them."""

import statistics
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from megatron_ext.planning.amounts import flops, size

SLOW_PRODUCT, SLOW_GROUP, SLOW_DISK = 0.85, 0.5, 0.3
"""Shares of the median below which a matrix product, a group's transfers, and a disk are too slow."""
MOST_SKEW = 2.0
"""Seconds that the clocks of two nodes may be apart."""
MOST_USED = 0.1
"""Share of a GPU's memory that may be in use before anything starts."""
RULE = (
    f"A node is bad if its product rate is below {SLOW_PRODUCT:.0%} of the median of all ranks, its disk below "
    f"{SLOW_DISK:.0%} of that of all nodes, a group of its ranks below {SLOW_GROUP:.0%} of that of its kind, its clock "
    f"off where two are more than {MOST_SKEW:g} s apart, more than {MOST_USED:.0%} of a GPU's memory in use, its GPU "
    "not healthy, or code, libraries, configuration or data other than those of rank 0."
)


@dataclass(frozen=True)
class Link:
    """A group that a rank is in, and its transfers."""

    ranks: tuple[int, ...]
    rate: float
    """Bytes a second."""


@dataclass(frozen=True)
class RankReport:
    """What one rank found."""

    rank: int
    host: str
    device: str
    same: Mapping[str, str]
    """What must be the same everywhere, by name: this package, what it stands on, configuration, data."""
    clock: float
    """Seconds ahead of the median."""
    memory_free: int
    memory_total: int
    """Bytes, of the device."""
    product: float
    """FLOP/s of a large matrix product."""
    disk: float | None = None
    """Bytes a second, written and synced where checkpoints go; of one rank a node."""
    links: Mapping[str, Link] = field(default_factory=dict)
    """By the kind of the group."""
    health: str = ""
    """What the driver says of the GPU: clocks, temperature."""
    faults: Sequence[str] = ()
    """What is wrong whatever the others found."""


@dataclass(frozen=True)
class Bad:
    """A node that is not fit, and why."""

    host: str
    why: str


def bad_nodes(reports: Sequence[RankReport]) -> list[Bad]:
    """Every reason against a node, each said once; see RULE."""
    found: dict[Bad, None] = {}
    for bad in (*_different(reports), *_alone_bad(reports), *_slow(reports), *_slow_groups(reports)):
        found.setdefault(bad)
    return list(found)


def _different(reports: Sequence[RankReport]) -> Iterator[Bad]:
    first = reports[0]
    for report in reports[1:]:
        for name, value in report.same.items():
            if value != first.same[name]:
                yield Bad(report.host, f"other {name} than {first.host}: {value}, and {first.same[name]} there")


def _alone_bad(reports: Sequence[RankReport]) -> Iterator[Bad]:
    clocks = [report.clock for report in reports]
    apart = max(clocks) - min(clocks)
    for report in reports:
        for fault in report.faults:
            yield Bad(report.host, f"rank {report.rank}: {fault}")
        # Of two nodes nobody knows which is right: the median lies between them, and both are named.
        if apart > MOST_SKEW and abs(report.clock) >= MOST_SKEW / 2:
            yield Bad(report.host, f"its clock is {report.clock:+.1f} s off")
        if report.device != "cpu" and report.memory_free < (1 - MOST_USED) * report.memory_total:
            used = size(report.memory_total - report.memory_free)
            yield Bad(report.host, f"{report.device}: {used} of {size(report.memory_total)} are in use already")


def _slow(reports: Sequence[RankReport]) -> Iterator[Bad]:
    fastest = {report.host: max(r.product for r in reports if r.host == report.host) for report in reports}
    # Ranks on CPU share the cores of their host, which is as fast as the fastest of them.
    rates = [fastest[report.host] if report.device == "cpu" else report.product for report in reports]
    usual = statistics.median(rates)
    for report, rate in zip(reports, rates, strict=True):
        if rate < SLOW_PRODUCT * usual:
            both = f"{flops(rate)}/s, and {flops(usual)}/s at the median"
            yield Bad(report.host, f"rank {report.rank} ({report.device}) multiplies {both}")
    disks = [report.disk for report in reports if report.disk is not None]
    if len(fastest) > 1 and disks:
        usual = statistics.median(disks)
        for report in reports:
            if report.disk is not None and report.disk < SLOW_DISK * usual:
                yield Bad(
                    report.host, f"writes checkpoints at {size(report.disk)}/s, and {size(usual)}/s at the median"
                )


def _slow_groups(reports: Sequence[RankReport]) -> Iterator[Bad]:
    """Groups far slower than the others of their kind: the nodes that are in no fast one, or else all of them."""
    if reports[0].device == "cpu" and len({report.host for report in reports}) == 1:
        return  # their ranks share one machine
    for kind in dict.fromkeys(kind for report in reports for kind in report.links):
        groups = {report.links[kind].ranks: report.links[kind].rate for report in reports if kind in report.links}
        usual = statistics.median(groups.values())
        slow = {ranks: rate for ranks, rate in groups.items() if rate < SLOW_GROUP * usual}
        fit = {reports[rank].host for ranks in groups.keys() - slow.keys() for rank in ranks}
        for ranks, rate in slow.items():
            hosts = dict.fromkeys(reports[rank].host for rank in ranks)
            named = [host for host in hosts if host not in fit] or list(hosts)
            members = ", ".join(map(str, ranks))
            for host in named:
                rates = f"{size(rate)}/s, and {size(usual)}/s at the median"
                yield Bad(host, f"the {kind} group of the ranks {members} transfers {rates}")


def table(reports: Sequence[RankReport]) -> list[str]:
    """A line a rank, under a head."""
    kinds = list(dict.fromkeys(kind for report in reports for kind in report.links))
    head = [
        "rank",
        "node",
        "device",
        "product",
        *(f"{kind}" for kind in kinds),
        "disk",
        "memory free",
        "clock",
        "health",
    ]
    bad = defaultdict(list)
    for one in bad_nodes(reports):
        bad[one.host].append(one.why)
    rows = [head]
    for report in reports:
        rows.append(
            [
                str(report.rank),
                report.host + (" BAD" if report.host in bad else ""),
                report.device,
                f"{flops(report.product)}/s",
                *(f"{size(report.links[kind].rate)}/s" if kind in report.links else "-" for kind in kinds),
                f"{size(report.disk)}/s" if report.disk is not None else "",
                size(report.memory_free),
                f"{report.clock:+.2f} s",
                report.health or "-",
            ]
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    return ["  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
