"""Rules of adapters: what they would add nothing to, what would train something else than it says."""

import difflib

from megatron_ext.config.adapters import (
    EMBEDDING_MODULE,
    OUTPUT_MODULE,
    LoraConfig,
    adapted_projections,
    projections,
)
from megatron_ext.config.model import ModelConfig
from megatron_ext.config.rules.registry import BACKEND, rule

_MODEL, _ADAPTERS = "model", "adapters"


@rule("checkpoint.initialize_from", given=(_ADAPTERS,))
def _adapters_need_a_base(base: str | None, adapters: LoraConfig | None) -> str | None:
    if adapters is not None and base is None:
        return "adapters are trained beside the weights of a base model; give its checkpoint, or remove adapters"
    return None


@rule(given=(_MODEL, _ADAPTERS))
def _patterns_match(model: ModelConfig | None, adapters: LoraConfig | None) -> list[str]:
    if adapters is None or model is None:
        return []
    known = list(projections(model))
    faults = []
    for number, target in enumerate(adapters.targets):
        for pattern in target.match:
            if any(projection.matches(pattern) for projection in known):
                continue
            words = sorted({word for p in known for word in (p.name, p.part.rpartition(".")[2], p.part)})
            near = difflib.get_close_matches(pattern, words, n=3, cutoff=0.4) or words
            faults.append(
                f"adapters.targets.{number}.match: {pattern!r} matches no projection of the model; it has "
                f"{', '.join(near)}"
            )
    got = list(adapted_projections(model, adapters).values())
    for number, target in enumerate(adapters.targets):
        matched = [one for one in known if any(one.matches(pattern) for pattern in target.match)]
        if matched and not any(one is target for one in got):
            faults.append(
                f"adapters.targets.{number}: all it matches ({', '.join(target.match)}) goes to targets before it, "
                "of which the first counts; put it before them, or remove it"
            )
    return faults


@rule(given=(_MODEL, _ADAPTERS, "parallel.etp"))
def _expert_adapters_are_whole(model: ModelConfig | None, adapters: LoraConfig | None, etp: int) -> str | None:
    if adapters is None or model is None or etp == 1:
        return None
    if any(projection.is_expert for projection in adapted_projections(model, adapters)):
        return (
            f"parallel.expert_tensor_parallel_size = {etp}: adapters of routed experts are not split; set it to 1, or "
            "leave experts.* out of adapters.targets"
        )
    return None


@rule(given=(_MODEL, _ADAPTERS))
def _tied_weights_have_no_halves(model: ModelConfig | None, adapters: LoraConfig | None) -> str | None:
    if adapters is None or model is None or model.untie_embeddings_and_output_weights:
        return None
    for projection in adapted_projections(model, adapters):
        if projection.module in (EMBEDDING_MODULE, OUTPUT_MODULE):
            return (
                f"adapters.targets: matches {projection.module}, which is one matrix with the other end of the model "
                "(model.untie_embeddings_and_output_weights = False): merging would change both. Leave it out, or "
                "begin with a model that has both: tools/convert.py MODEL TARGET --to megatron --untie"
            )
    return None


@rule("recompute.logits", given=(_MODEL, _ADAPTERS))
def _an_adapted_output_layer_has_logits(
    again: bool, model: ModelConfig | None, adapters: LoraConfig | None
) -> str | None:
    if not again or adapters is None or model is None:
        return None
    if any(projection.module == OUTPUT_MODULE for projection in adapted_projections(model, adapters)):
        return (
            "adapters.targets: matches output_layer, whose adapter adds to all logits; leave it out, or set it to False"
        )
    return None


@rule(BACKEND, given=(_ADAPTERS,))
def _adapters_are_of_the_torch_backend(backend: str, adapters: LoraConfig | None) -> str | None:
    if adapters is not None and backend != "torch":
        return "adapters are computed by the torch backend alone; set it to torch"
    return None


@rule("parallel.moe_shared_expert_overlap", given=(_ADAPTERS,))
def _no_overlapped_shared_experts(overlap: bool, adapters: LoraConfig | None) -> str | None:
    if adapters is not None and overlap:
        return "overlapped shared experts communicate outside their linear layers, past their adapters; remove it"
    return None
