"""Rules of tasks: what their data brings itself."""

from collections.abc import Sequence

from megatron_ext.config.data import Stage
from megatron_ext.config.rules.registry import BACKEND, rule

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
