"""A training configuration for an upcycled model, with what the papers recommend as comments."""

from dataclasses import replace

from megatron_ext.config import ModelConfig
from megatron_ext.model_io.recipe import Recipe, Target, training_recipe
from megatron_ext.upcycling.plan import UpcyclePlan

_AUX_LOSS = 1e-2
_COMMENTS = {
    "model:": [
        "A balance loss of 1e-2 to 1e-3 did well for upcycled models (He et al. 2024, arXiv 2410.07524, section 4; "
        "Drop-Upcycling, arXiv 2502.19261, took 2e-2); a router z-loss made no difference there.",
    ],
    "parallel:": ["python tools/prove.py FILE.yaml shows on a CPU that a layout trains like one process."],
    "train:": ["Batches of about 4M tokens did better than 2M and 32M (arXiv 2410.07524, section 4)."],
    "optimizer:": [
        "Back to the peak learning rate of pretraining (arXiv 2410.07524, section 4): going on with its last, small "
        "one leaves experts close to each other. Komatsuzaki et al. 2022 (arXiv 2212.05055) went on with the schedule.",
    ],
}


def upcycling_recipe(plan: UpcyclePlan) -> Recipe:
    """YAML of a run that trains the upcycled model from step 0, made of the source's own run where it has one."""
    return training_recipe(
        Target(
            plan.options.target,
            _balanced(plan.moe),
            f"upcycled by {plan.method.kind}" if plan.adds_experts else "deepened",
            plan.checkpoints[0].run,
            plan.checkpoints[0].tokenizer,
            _COMMENTS if plan.adds_experts else {},
        )
    )


def _balanced(moe: ModelConfig) -> ModelConfig:
    if not moe.is_moe or moe.moe_router_enable_expert_bias or any(moe.balance_losses.values()):
        return moe
    return replace(moe, moe_aux_loss_coeff=_AUX_LOSS)
