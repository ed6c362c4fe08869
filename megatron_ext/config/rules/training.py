"""Rules of batches, data and recompute, and of when a job ends."""

from typing import Any

from megatron_ext.config.model import ModelConfig
from megatron_ext.config.rules.registry import BACKEND, DEVICE, PP, VPP, rule
from megatron_ext.config.training import ExitAt, RampStep

OFFLOAD = "recompute.offload_layers"


@rule("data.reset_attention_mask", BACKEND)
def _documents_need_our_attention(reset: bool, backend: str) -> str | None:
    if reset and backend != "torch":
        return "Transformer Engine's attention would ignore the documents; set runtime.backend: torch"
    return None


@rule("data.reset_position_ids", "data.reset_attention_mask", "model.position_embedding_type")
def _rotary_positions_restart_with_attention(positions: bool, attention: bool, embedding: str) -> str | None:
    if positions and not attention and embedding == "rope":
        return (
            "rotary embedding knows distances, not positions: while tokens attend across documents nothing starts "
            "anew; set data.reset_attention_mask: true or remove reset_position_ids"
        )
    return None


@rule("data.sequence_length", "model.max_position_embeddings", given=("model.rope_scaling",))
def _sequence_fits_model(length: int, positions: int, scaling: Any) -> str | None:
    # To dynamic scaling max_position_embeddings is the length before it sets in.
    longest = positions * scaling.factor if scaling is not None and scaling.kind == "dynamic" else positions
    if length > longest:
        return "samples are longer than the model is declared for; raise max_position_embeddings"
    return None


def _register_moment(dtype: str, decay: str) -> None:
    @rule(dtype, decay)
    def _a_moment_moves(kept_in: str, beta: float) -> str | None:
        # Half the distance of neighbours in bf16 is up to 2^-8 of a number: smaller steps are rounded away.
        if kept_in == "bf16" and 1 - beta <= 2**-8:
            return "rounded to bf16, a moment that changes by less than 1/256 a step stands still; set its dtype: fp32"
        return None


_register_moment("optimizer.exp_avg_dtype", "optimizer.adam_beta1")
_register_moment("optimizer.exp_avg_sq_dtype", "optimizer.adam_beta2")


@rule("optimizer.moments_on_host", DEVICE)
def _a_gpu_has_a_host(on_host: bool, device: str) -> str | None:
    return "a CPU computes in its own memory; remove it" if on_host and device == "cpu" else None


@rule("train.global_batch_size", "train.micro_batch_size")
def _micro_divides_global(global_batch: int, micro: int) -> str | None:
    return "the global batch must be a multiple of the micro-batch" if global_batch % micro else None


@rule("train.batch_size_ramp")
def _ramp_is_whole(ramp: list[RampStep]) -> str | None:
    for number, step in enumerate(ramp):
        size, samples = step.global_batch_size, step.samples
        if (step.steps is None) == (samples is None):
            return f"entry {number} has {'both' if step.steps else 'neither'} steps and samples; set one of them"
        if samples is not None and samples % size:
            return f"entry {number}: samples = {samples} is not a multiple of global_batch_size = {size}"
    return None


@rule("train.batch_size_ramp", "train.micro_batch_size")
def _micro_divides_ramp(ramp: list[RampStep], micro: int) -> str | None:
    odd = [step.global_batch_size for step in ramp if step.global_batch_size % micro]
    return f"global batches of {odd} are no multiples of the micro-batch" if odd else None


@rule("train.skip_steps", "train.train_iters")
def _skips_are_ranges(skips: list[list[int]], iters: int) -> str | None:
    for skip in skips:
        if len(skip) != 2 or not 1 <= skip[0] <= skip[1] or skip[1] > iters > 0:
            return f"{skip} is no range [first, last] of steps of this run"
    return None


@rule("train.skip_samples")
def _skipped_samples_are_ranges(skips: list[list[int]]) -> str | None:
    for skip in skips:
        if len(skip) != 2 or not 0 <= skip[0] <= skip[1]:
            return f"{skip} is no range [first, last] of samples, counted from 0"
    return None


@rule("train.eval_interval", given=("data.validation",))
def _eval_needs_data(interval: int | None, validation: list[Any]) -> str | None:
    return "validation needs data.validation" if interval and not validation else None


@rule("recompute.granularity", "recompute.num_layers", given=("model.num_layers", PP, VPP))
def _recompute_fits(granularity: str | None, chunk: int, layers: int, pp: int, vpp: int | None) -> str | None:
    stage = layers // (pp * (vpp or 1))
    return f"a stage chunk has only {stage} layers" if granularity == "full" and chunk > stage else None


@rule("recompute.modules", "recompute.granularity")
def _modules_are_selective(modules: list[str], granularity: str | None) -> str | None:
    if granularity == "selective":
        return None if modules else "nothing would be recomputed; name modules, or unset the granularity"
    return "has no effect; set granularity: selective" if modules != ["core_attn"] else None


@rule("recompute.modules", given=("recompute.granularity", "model"))
def _the_model_has_such_modules(modules: list[str], granularity: str | None, model: ModelConfig | None) -> str | None:
    if granularity != "selective" or model is None:
        return None
    has = {
        "mlp": model.has_dense_layers,
        "moe": model.is_moe,
        "shared_experts": model.is_moe and model.moe_shared_expert_intermediate_size is not None,
    }
    missing = [module for module in modules if not has.get(module, True)]
    if not missing:
        return None
    there = ", ".join(["core_attn", "layernorm", *(module for module, is_there in has.items() if is_there)])
    if len(missing) == len(modules):
        return f"the model has none of these, and nothing would be recomputed; it has {there}"
    return f"the model has no {', '.join(missing)}; leave it out: it has {there}"


@rule("recompute.logits", "model.transformer_overrides")
def _logits_are_there_for_late_gradients(again: bool, overrides: dict[str, Any]) -> str | None:
    if again and overrides.get("defer_embedding_wgrad_compute"):
        return "a gradient of the output layer that is computed late needs the logits' gradient; leave one of both out"
    return None


@rule(OFFLOAD, given=("model.num_layers", PP, VPP))
def _offloaded_layers_are_there(count: int, layers: int, pp: int, vpp: int | None) -> str | None:
    stage = layers // (pp * (vpp or 1))
    return f"a stage chunk has only {stage} layers" if count > stage else None


@rule(OFFLOAD, "recompute.granularity")
def _what_is_offloaded_is_kept(count: int, granularity: str | None) -> str | None:
    if count and granularity == "full":
        return "layers that are computed again keep their input alone; set granularity: selective, or leave one out"
    return None


@rule(OFFLOAD, DEVICE)
def _activations_have_a_host(count: int, device: str) -> str | None:
    return "a CPU computes in its own memory; remove it" if count and device == "cpu" else None


@rule(OFFLOAD, "parallel.moe_shared_expert_overlap")
def _offload_follows_one_stream(count: int, overlap: bool) -> str | None:
    if count and overlap:
        return "overlapped shared experts have a stream of their own, which the copies do not follow; leave one out"
    return None


@rule(OFFLOAD, "model.transformer_overrides")
def _offload_is_alone(count: int, overrides: dict[str, Any]) -> str | None:
    if count and overrides.get("cpu_offloading"):
        return "both move activations; remove cpu_offloading"
    graphs = sorted(name for name in overrides if "cuda_graph" in name)
    if count and graphs:
        return f"a CUDA graph keeps its memory where it is; remove {', '.join(graphs)}"
    return None


@rule("recompute.offload_min_bytes", OFFLOAD)
def _small_is_said_of_what_moves(smallest: int, count: int) -> str | None:
    return "has no effect; set offload_layers" if smallest != 2**16 and not count else None


@rule("recompute.method", "recompute.num_layers", "recompute.granularity")
def _method_is_full(method: str, layers: int, granularity: str | None) -> str | None:
    given = (method, layers) != ("uniform", 1)
    return "have no effect; set granularity: full" if given and granularity != "full" else None


@rule("train.exit_at.time")
def _time_is_one(time: str | float | None) -> str | None:
    try:
        return None if (ExitAt(time=time).seconds or 0) >= 0 else "lies before 1970"
    except ValueError:
        return "is no time; write 2026-12-01T09:00 or 2026-12-01T09:00+09:00, or seconds since 1970"
