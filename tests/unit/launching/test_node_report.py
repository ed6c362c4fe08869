"""By which figures a node is bad, and that it is the bad one that is named."""

from dataclasses import replace

from megatron_ext.launching.node_report import Bad, Link, RankReport, bad_nodes, table

SAME = {"code": "c0de", "libraries": "torch 2", "configuration": "cfg", "data": "d"}


def ranks(nodes: int = 4, each: int = 2) -> list[RankReport]:
    """Two ranks a node that are a TP group, and DP groups across the nodes."""
    return [
        RankReport(
            rank=rank,
            host=f"n{rank // each}",
            device="cuda:0 H100",
            same=SAME,
            clock=0.01,
            memory_free=79 * 10**9,
            memory_total=80 * 10**9,
            product=7e14 * (1 + rank / 1000),
            disk=2e9 if rank % each == 0 else None,
            links={
                "TP": Link(tuple(r for r in range(nodes * each) if r // each == rank // each), 300e9),
                "DP": Link(tuple(r for r in range(nodes * each) if r % each == rank % each), 40e9),
            },
            health="1980 of 1980 MHz, 50 C",
        )
        for rank in range(nodes * each)
    ]


def with_rank(number: int, **values: object) -> list[RankReport]:
    return [replace(report, **values) if report.rank == number else report for report in ranks()]  # type: ignore[arg-type]


def only(reports: list[RankReport]) -> Bad:
    [bad] = bad_nodes(reports)
    return bad


def test_nodes_that_are_alike_are_fit_and_stand_in_a_table() -> None:
    assert bad_nodes(ranks()) == []
    head, first, second, *_ = table(ranks())
    assert head.split()[:6] == ["rank", "node", "device", "product", "TP", "DP"]
    assert first.split("  ")[-1] == "1980 of 1980 MHz, 50 C"
    assert "2.00 GB/s" in first
    assert "2.00 GB/s" not in second


def test_the_bad_node_is_named_with_both_figures() -> None:
    assert only(with_rank(5, product=4e14)) == Bad(
        "n2", "rank 5 (cuda:0 H100) multiplies 400 TFLOP/s, and 702 TFLOP/s at the median"
    )
    assert only(with_rank(4, disk=2e8)) == Bad("n2", "writes checkpoints at 200 MB/s, and 2.00 GB/s at the median")
    assert only(with_rank(6, clock=-7.5)) == Bad("n3", "its clock is -7.5 s off")
    assert "9.00 GB of 80.0 GB are in use already" in only(with_rank(6, memory_free=71 * 10**9)).why
    assert only(with_rank(3, same={**SAME, "code": "01d"})) == Bad("n1", "other code than n0: 01d, and c0de there")
    assert only(with_rank(3, faults=["GPU-1 has 2 uncorrected memory errors"])).host == "n1"
    assert "n3 BAD" in table(with_rank(6, clock=9.0))[7]


def test_of_two_nodes_whose_clocks_are_apart_both_are_named() -> None:
    for apart, named in ((3.0, {"n0", "n1"}), (1.9, set())):
        reports = [replace(report, clock=(-apart if report.host == "n0" else apart) / 2) for report in ranks(nodes=2)]
        assert {bad.host for bad in bad_nodes(reports)} == named


def test_of_a_slow_group_the_node_is_named_that_is_in_no_fast_one() -> None:
    slow = Link((4, 5), 20e9)
    reports = [
        replace(report, links={**report.links, "TP": slow}) if report.rank in (4, 5) else report for report in ranks()
    ]
    assert only(reports) == Bad("n2", "the TP group of the ranks 4, 5 transfers 20.0 GB/s, and 300 GB/s at the median")


def test_ranks_on_cpu_share_their_host_and_hosts_are_compared() -> None:
    cpus = [replace(report, device="cpu", product=10e9 if report.rank % 2 else 90e9) for report in ranks()]
    assert bad_nodes(cpus) == []
    slow = [replace(report, product=20e9) if report.host == "n3" else report for report in cpus]
    assert {bad.host for bad in bad_nodes(slow)} == {"n3"}
    alone = [replace(report, host="n0", links={"TP": Link((report.rank,), 1.0 + report.rank)}) for report in cpus]
    assert bad_nodes(alone) == []
