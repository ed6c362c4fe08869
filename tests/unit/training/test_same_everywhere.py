"""Ranks that were started with other runs are named, with the keys."""

from megatron_ext.training.same_everywhere import differences


def test_the_keys_are_named_once_for_ranks_that_are_alike() -> None:
    first, other = {"optimizer.lr": 1e-3, "train.seed": 1}, {"optimizer.lr": 0.5, "train.seed": 1, "a.b": 2}
    assert list(differences([("n0", first), ("n0", dict(first))])) == []
    assert list(differences([("n0", first), ("n1", other), ("n1", dict(other))])) == [
        "ranks 1 to 2 on n1, unlike rank 0 on n0: optimizer.lr = 0.5 (0.001 there), a.b = 2 (None there)"
    ]
