"""What a run would be: the text that `--check` prints before anything is started."""

from dataclasses import replace

from megatron_ext.architectures.registry import architecture_for
from megatron_ext.canonical.adapters import adapter_tensors
from megatron_ext.canonical.counts import count_parameters
from megatron_ext.config import Layout, PreferenceTask, RunConfig, dump_yaml, smallest_world_size, to_mapping
from megatron_ext.config.preference import turned_off
from megatron_ext.data.stream.plan import RunPlan
from megatron_ext.errors import ConversionError
from megatron_ext.planning.amounts import flops
from megatron_ext.planning.flops import training_flops_per_token
from megatron_ext.planning.guard_line import guard_line
from megatron_ext.planning.memory import state_memory
from megatron_ext.planning.peak_memory import PeakMemory, peak_memory
from megatron_ext.runtime.core_guard import versions

_MOST_ROWS = 32


def describe_run(run: RunConfig, world_size: int | None, plan: RunPlan | None = None) -> str:
    """The resolved configuration, the rank grid, parameters, FLOPs and state memory of `run`.

    Args:
        world_size: processes; None takes the fewest the layout needs.
        plan: of its data, where the sizes of that are known.

    Raises:
        ConfigError: an override would not do what it says.
    """
    if run.model.transformer_overrides:
        from megatron_ext.mcore.overrides import check_overrides  # seconds to import, seldom needed

        check_overrides(run.model)
    processes = world_size or smallest_world_size(run.parallel)
    layout = run.resolve(processes)
    counts = count_parameters(run.model)
    memory = state_memory(run, layout)
    if plan is not None and run.data.stages:
        run = replace(run, train=replace(run.train, train_iters=plan.total_steps))
    each = training_flops_per_token(run.model, run.data.sequence_length, run.adapters, run.task)
    lines = [
        dump_yaml(to_mapping(run)),
        _grid(layout, assumed=world_size is None),
        "",
        f"parameters      {counts.total:,} in all, {counts.active:,} active for each token",
        *_adapters(run, counts.total),
        *_preference(run),
        f"training        {_work(run, each, plan)}",
        f"state memory    {memory.bytes / 2**30:,.3g} GiB on the fullest rank ({memory.parameters:,} parameters, "
        "without activations)",
        f"peak memory     {_peak(run, layout)}",
        f"guard           {guard_line(run)}",
        f"Hugging Face    {_export(run)}",
        f"micro-batches   {_micro_batches(run, layout)} tokens a rank and step",
        f"overlap         {_overlap(run, layout)}",
        f"installed       {versions()}",
    ]
    return "\n".join(lines)


def _peak(run: RunConfig, layout: Layout) -> str:
    """What a step needs on the fullest rank, by planning/peak_memory.py."""
    peak = peak_memory(run, layout)
    flight = f", {peak.in_flight:.3g} micro-batches of them in flight" if layout.pp > 1 else ""
    return (
        f"{peak.total / 2**30:,.3g} GiB on the fullest rank, of stage {peak.stage}: state {peak.state / 2**30:,.3g}, "
        f"activations {peak.kept / 2**30:,.3g}{flight}, worked with {peak.working / 2**30:,.3g}; beside it what the "
        f"device and its allocator take{_host(peak)} (tools/plan.py has other layouts)"
    )


def _host(peak: PeakMemory) -> str:
    return f", and {peak.on_host / 2**30:,.3g} GiB of its host's memory" if peak.on_host else ""


def _adapters(run: RunConfig, of: int) -> list[str]:
    """What is trained beside how many weights."""
    if run.adapters is None:
        return []
    sizes = [tensor.size for tensor in adapter_tensors(run.model, run.adapters).values()]
    share = f"{sum(sizes) / of:.2%} of those"
    return [f"adapters        {sum(sizes):,} parameters in {len(sizes) // 2:,} pairs are trained, {share}"]


def _preference(run: RunConfig) -> list[str]:
    """What answers are compared with, and what of the model is left out of account for it."""
    if not isinstance(run.task, PreferenceTask):
        return []
    kinds = {
        "adapters_off": "the base, computed beside each step with the adapters switched off",
        "file": "the weights that the run starts from, by files beside the pairs that are computed once",
        "none": "none",
    }
    lines = [f"reference       {kinds[run.task.reference_of(has_adapters=run.adapters is not None)]}"]
    if off := turned_off(run.task, run.model, run.adapters):
        lines.append(f"off             {', '.join(off)}: answers and reference are of one function of the weights")
    return lines


def _work(run: RunConfig, each: float, plan: RunPlan | None) -> str:
    """Tokens, and floating-point operations a token and in all."""
    if plan is None and run.data.stages:
        return f"{flops(each)} a token; how many tokens the stages have, their sources say"
    if plan is None:
        tokens = run.planned_samples * run.data.sequence_length
        return f"{tokens:,} tokens, {flops(each)} a token, {flops(each * tokens)} in all"
    total = sum(
        training_flops_per_token(run.model, s.sequence_length, run.adapters, run.task) * s.tokens for s in plan.stages
    )
    return f"{plan.total_tokens:,} tokens, {flops(total / plan.total_tokens)} a token, {flops(total)} in all"


def _micro_batches(run: RunConfig, layout: Layout) -> str:
    """How many of which size a rank computes in a step; of every kind of step that the run has."""
    shapes = ((s.size // (s.micro_size * layout.dp), s.micro_size, s.length) for s in run.step_shapes)
    return ", ".join(f"{number} of {size} x {length}" for number, size, length in dict.fromkeys(shapes))


def _overlap(run: RunConfig, layout: Layout) -> str:
    """What of data parallelism's messages travels beside computing; where the device is not said, on either."""
    words = {
        (False, False): "none",
        (True, False): "gradients are reduced during the backward pass",
        (True, True): "gradients are reduced during the backward pass, weights gathered during the next forward pass",
    }
    copies, said = layout.dp * layout.cp, dict[str, str]()
    for device in ("cuda", "cpu") if run.runtime.device == "auto" else (run.runtime.device,):
        settled = run.parallel.settled(on_cuda=device == "cuda", copies=copies)
        said[device] = words[bool(settled.overlap_grad_reduce), bool(settled.overlap_param_gather)]
    if len(set(said.values())) == 1:
        return next(iter(said.values()))
    return "; ".join(f"on {device.upper()} {text}" for device, text in said.items())


def _export(run: RunConfig) -> str:
    """What the trained model can be exported as."""
    try:
        return architecture_for(run.model)[1]
    except ConversionError as error:
        return f"cannot be exported: {error}"


def _grid(layout: Layout, *, assumed: bool) -> str:
    origin = " (the fewest this layout needs; --world-size N for another number)" if assumed else ""
    dense = f"TP {layout.tp} x CP {layout.cp} x DP {layout.dp} x PP {layout.pp}"
    experts = f"ETP {layout.etp} x EP {layout.ep} x EDP {layout.edp}"
    rows = [
        f"rank grid of {layout.world_size} processes{origin}: {dense}, experts {experts}",
        "  rank   tp   cp   dp   pp  etp   ep  edp",
    ]
    for rank in range(min(layout.world_size, _MOST_ROWS)):
        p = layout.position(rank)
        rows.append(f"  {p.rank:4d} {p.tp:4d} {p.cp:4d} {p.dp:4d} {p.pp:4d} {p.etp:4d} {p.ep:4d} {p.edp:4d}")
    if layout.world_size > _MOST_ROWS:
        rows.append(f"  ... and {layout.world_size - _MOST_ROWS} more")
    return "\n".join(rows)
