"""The losses of preference optimisation: values and gradients against figures computed apart, in float64."""

from typing import Any

import pytest
import torch

from megatron_ext.config import PreferenceTask, load_config
from megatron_ext.training.tasks.preference_losses import pair_losses

SUMS = torch.tensor([[-10.0, -14.0], [-42.0, -30.0]], dtype=torch.float64)
REFERENCE = torch.tensor([[-12.0, -11.0], [-40.0, -33.0]], dtype=torch.float64)
TOKENS = torch.tensor([[5.0, 7.0], [20.0, 12.0]], dtype=torch.float64)

# Of each the loss of both pairs, and its gradient by the chosen and by the rejected answer's sum; None: the opposite.
VECTORS: list[tuple[dict[str, Any], list[float], list[float], list[float] | None]] = [
    ({"beta": 0.1}, [0.474077, 0.974077], [-0.037754, -0.062246], None),
    ({"beta": 0.5}, [0.078890, 2.578890], [-0.037929, -0.462071], None),
    ({"label_smoothing": 0.1}, [0.524077, 0.924077], [-0.027754, -0.052246], None),
    ({"beta": 0.5, "label_smoothing": 0.1}, [0.328890, 2.328890], [0.012071, -0.412071], None),
    ({"loss": "robust", "label_smoothing": 0.1}, [0.411577, 1.036577], [-0.050254, -0.074746], None),
    (
        {"loss": "robust", "beta": 0.5, "label_smoothing": 0.1},
        [-0.233610, 2.891390],
        [-0.100429, -0.524571],
        None,
    ),
    ({"loss": "hinge"}, [0.5, 1.5], [-0.1, -0.1], None),
    ({"loss": "hinge", "beta": 0.5}, [0.0, 3.5], [0.0, -0.5], None),
    ({"loss": "ipo", "log_probs": "sum"}, [0.0, 100.0], [0.0, -20.0], None),
    ({"loss": "ipo", "log_probs": "sum", "beta": 0.5}, [16.0, 36.0], [8.0, -12.0], None),
    (
        {"loss": "ipo", "log_probs": "mean"},
        [17.400816, 28.622500],
        [-1.668571, -0.535000],
        [1.191837, 0.891667],
    ),
    (
        {"loss": "ipo", "log_probs": "mean", "beta": 0.5},
        [0.029388, 1.822500],
        [-0.068571, -0.135000],
        [0.048980, 0.225000],
    ),
    ({"reference": "none"}, [0.513015, 1.463282], [-0.040131, -0.076852], None),
    ({"log_probs": "mean"}, [0.652577, 0.710800], [-0.009586, -0.002544], [0.006847, 0.004240]),
    ({"log_probs": "mean", "beta": 5.0}, [0.015753, 1.910224], [-0.015629, -0.212988], [0.011164, 0.354980]),
    (
        {"loss": "simpo", "beta": 2.0, "gamma": 1.0},
        [1.313262, 0.798139],
        [-0.292423, -0.054983],
        [0.208874, 0.091639],
    ),
    ({"loss": "orpo"}, [2.069315, 2.149521], [-0.211565, -0.052225], [0.008261, 0.003546]),
    ({"nll": 1.0}, [2.474077, 3.074077], [-0.237754, -0.112246], [0.037754, 0.062246]),
]


@pytest.mark.parametrize(
    ("settings", "losses", "chosen", "rejected"),
    VECTORS,
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_losses_and_gradients_by_the_vectors(
    settings: dict[str, Any], losses: list[float], chosen: list[float], rejected: list[float] | None
) -> None:
    task = load_config(PreferenceTask, {"kind": "preference", **settings}, source="test")
    sums = SUMS.clone().requires_grad_()
    without = task.reference_of(has_adapters=False) == "none"
    found = pair_losses(task, sums, TOKENS, None if without else REFERENCE)
    (slope,) = torch.autograd.grad(found.loss.sum(), sums)
    expected = torch.tensor([chosen, rejected or [-value for value in chosen]], dtype=torch.float64).t()
    torch.testing.assert_close(found.loss.detach(), torch.tensor(losses, dtype=torch.float64), rtol=0, atol=6e-7)
    torch.testing.assert_close(slope, expected, rtol=0, atol=6e-7)
    assert torch.autograd.gradcheck(lambda x: pair_losses(task, x, TOKENS, None if without else REFERENCE).loss, sums)


def test_rewards_and_losses_at_the_beginning() -> None:
    found = pair_losses(PreferenceTask(kind="preference"), SUMS, TOKENS, REFERENCE)
    expected = torch.tensor([[0.2, -0.3], [-0.2, 0.3]], dtype=torch.float64)
    torch.testing.assert_close(found.rewards, expected)
    for settings, loss in (({}, 0.693147), ({"loss": "ipo", "log_probs": "sum"}, 25.0)):
        task = load_config(PreferenceTask, {"kind": "preference", **settings}, source="test")
        same = pair_losses(task, SUMS, TOKENS, SUMS)
        assert same.loss.tolist() == pytest.approx([loss, loss], abs=1e-6)
        assert not same.rewards.any()


def test_orpo_of_answers_that_are_certain_is_finite() -> None:
    sums = torch.tensor([[0.0, -3.0], [-3.0, 0.0], [0.0, 0.0]], requires_grad=True)
    task = load_config(PreferenceTask, {"kind": "preference", "loss": "orpo"}, source="task")
    loss = pair_losses(task, sums, torch.ones(3, 2), None).loss
    loss.sum().backward()
    assert bool(loss.isfinite().all())
    assert sums.grad is not None
    assert bool(sums.grad.isfinite().all())
