"""Which ranks are slow, and how their node is named."""

from megatron_ext.training.hooks.slow_ranks import Behind, nodes_behind, ranks_behind


def test_a_rank_is_compared_with_those_of_its_stage() -> None:
    stages = [0, 0, 0, 0, 1, 1, 1, 1]
    assert ranks_behind([2.0, 2.1, 2.0, 2.1, 1.0, 1.0, 1.0, 1.1], stages) == []
    assert ranks_behind([2.0, 2.1, 2.0, 2.1, 1.0, 1.0, 1.5, 1.1], stages) == [Behind(6, 1.5, 1.0)]
    assert ranks_behind([1.0, 1.5], [0, 0]) == [Behind(1, 1.5, 1.0)]
    assert ranks_behind([0.001, 0.005], [0, 0]) == []  # nobody minds
    assert ranks_behind([0.0, 0.0], [0, 0]) == []  # no step was taken


def test_the_node_is_named_with_its_ranks() -> None:
    behind = {2: Behind(2, 1.5, 1.0), 3: Behind(3, 1.75, 1.0), 5: Behind(5, 2.0, 1.0)}
    said = nodes_behind(behind, ["a", "a", "b", "b", "c", "c"])
    assert said["b"] == (
        "node b is slow: its ranks 2, 3 of 2 need up to 1.75 s for their part of a step, and others of the stage 1 s"
    )
    assert said["c"].startswith("node c is slow: its rank 5 of 2 needs up to 2 s")
