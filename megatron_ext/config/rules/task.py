"""Rules of tasks: what their data brings itself."""

from collections.abc import Sequence

from megatron_ext.config.adapters import LoraConfig
from megatron_ext.config.data import Stage
from megatron_ext.config.rules.registry import BACKEND, rule
from megatron_ext.config.task import WITHOUT_REFERENCE

_MOST, _LEAST = 100.0, 1e-6
"""Of task.beta: exp(-104) is the least positive number of fp32, and 1e-8 Adam's usual epsilon."""
_OF_TEXT = ("eod_mask_loss", "reset_attention_mask", "reset_position_ids", "pack_documents")


@rule("task.kind", given=tuple(f"data.{name}" for name in _OF_TEXT))
def _samples_of_conversations_are_packed(kind: str, *given: bool) -> list[str]:
    if kind == "pretrain":
        return []
    return [
        f"data.{name} = true: is of documents of text; samples of conversations are packed, each with attention, "
        "positions and labels of its own; leave it out"
        for name, is_set in zip(_OF_TEXT, given, strict=True)
        if is_set
    ]


@rule("task.kind", "data.cache_dir")
def _order_of_conversations_is_computed(kind: str, cache_dir: str | None) -> str | None:
    if kind != "pretrain" and cache_dir is not None:
        return "megatron-core's order is of texts; leave data.cache_dir out"
    return None


@rule("task.kind", given=("data.stages", "data.sequence_length", "data.unit_tokens"))
def _packs_are_of_one_length(kind: str, stages: Sequence[Stage], length: int, unit: int | None) -> list[str]:
    if kind == "pretrain":
        return []
    faults = []
    if len(lengths := {stage.sequence_length or length for stage in stages}) > 1:
        shown = ", ".join(map(str, sorted(lengths)))
        faults.append(f"the stages have the sequence lengths {shown}; packs of conversations are of one")
    if unit is not None:
        faults.append(f"data.unit_tokens = {unit}: a pack is a unit; leave data.unit_tokens out")
    return faults


@rule("task.kind", BACKEND)
def _conversations_need_our_attention(kind: str, backend: str) -> str | None:
    if kind != "pretrain" and backend != "torch":
        return "Transformer Engine's attention would not keep packed samples apart; set runtime.backend: torch"
    return None


@rule("task.loss", "task.log_probs")
def _what_is_compared_is_said(loss: str, log_probs: str | None) -> str | None:
    if loss == "ipo" and log_probs is None:
        return "ipo's paper has sums, its authors' experiments have means, with another best beta: say sum or mean"
    if loss in WITHOUT_REFERENCE and log_probs == "sum":
        return f"{loss} compares mean log-probabilities; leave task.log_probs out"
    return None


@rule("task.beta")
def _differences_have_a_gradient(beta: float) -> str | None:
    if beta > _MOST:
        return (
            f"above {_MOST:g} a difference of one nat, as a single token makes, has no gradient left in fp32; papers "
            "have 0.01 to 10"
        )
    if beta < _LEAST:
        return f"below {_LEAST:g} gradients drown in optimizer.adam_eps; papers have 0.01 to 10"
    return None


@rule("task.gamma", "task.beta")
def _margin_is_within_reach(gamma: float | None, beta: float) -> str | None:
    if gamma is not None and beta <= _MOST < gamma:
        return f"above {_MOST:g} no pair ever reaches the margin; the paper has about half of task.beta"
    return None


@rule("task.loss", "task.label_smoothing")
def _labels_are_smoothed(loss: str, smoothing: float) -> str | None:
    if smoothing and loss not in ("sigmoid", "robust"):
        return f"{loss} has no label smoothing; leave it out, or take sigmoid or robust"
    if loss == "robust" and not smoothing:
        return "without label_smoothing robust is sigmoid; say the share of pairs that are the wrong way round"
    return None


@rule("task.loss", "task.gamma")
def _margin_is_of_simpo(loss: str, gamma: float | None) -> str | None:
    if loss == "simpo" and gamma is None:
        return "simpo aims at a margin: set task.gamma, about half of task.beta"
    return f"{loss} aims at no margin; leave task.gamma out" if loss != "simpo" and gamma is not None else None


@rule("task.loss", "task.nll")
def _orpo_has_its_cross_entropy(loss: str, nll: float) -> str | None:
    if loss == "orpo" and nll:
        return "orpo has the cross-entropy of the chosen answer already; leave task.nll out"
    return None


@rule("task.loss", "task.reference", given=("adapters",))
def _reference_is_there(loss: str, reference: str | None, adapters: LoraConfig | None) -> str | None:
    if loss in WITHOUT_REFERENCE and reference not in (None, "none"):
        return f"{loss} compares with no reference; leave task.reference out"
    if reference == "adapters_off" and adapters is None:
        return "without adapters there is no base beside what is trained; set file, or give adapters"
    return None


@rule("task.kind", "model.output_z_loss_coeff")
def _output_z_loss_is_of_every_token(kind: str, coefficient: float) -> str | None:
    if kind == "preference" and coefficient:
        return "is a loss of every token, prompts too, which a comparison of answers has none of; set it to 0"
    return None
