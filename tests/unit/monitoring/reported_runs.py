"""Metrics files of short runs, as a report reads them."""

from pathlib import Path

from megatron_ext.monitoring.metrics_file import MetricsFile

LOADS = {"1": [0.5, 0.25, 0.25], "2": [0.4, 0.3, 0.3]}
HEALTH = {"max_violation": 0.5, "dead_experts": 0, "entropy": 0.9, "top1": 0.4, "max1_max2": 1.5, "drop_rate": 0.0}


def write_metrics(path: Path, steps: int, *, loss: float, experts: bool = False) -> str:
    file = MetricsFile(path)
    described = {"layout": {"processes": 4, "TP": 2}, "versions": {"torch": "2.13"}, "run": {"train": {"seed": 7}}}
    file.write({"event": "start", "iteration": 0, "time": 100.0, **described})
    for step in range(1, steps + 1):
        record: dict[str, object] = {
            "iteration": step,
            "loss": loss - step / 10,
            "learning_rate": 1e-3,
            "consumed_tokens": step * 1000,
            "tokens_per_second": 500.0 + step,
            "tflops_per_device": 0.25,
            "grad_norm": 1.0 / step,
            "memory_bytes": 2**31,
            "time": 100.0 + 36 * step,
        }
        if experts:
            record["moe"] = {layer: {**HEALTH, "load": load} for layer, load in LOADS.items()}
            record |= sources_of(step)
            record |= {"step_seconds": {"data": 0.25, "forward_backward": 1.0}, "figures": {"checkpoint_lag": 2}}
        file.write(record)
    file.write({"iteration": steps, "validation_loss": loss, **(VALIDATED if experts else {})})
    if experts:
        file.write({"event": "skip", "iteration": 3, "text": "a </script> spike", "time": 100.0})
        file.write({"event": "failed", "iteration": 5, "text": "out of memory", "time": 100.0})
    file.close()
    return str(path)


def sources_of(step: int) -> dict[str, object]:
    """Two sources, of which the second comes with the second stage, in every other step."""
    values = {"supervised_tokens": 100.0, "consumed_tokens": step * 900, "epochs": step / 10}
    sources = {"en": {"loss": 4.0 - step / 10, **values}}
    if step % 2 == 0:
        sources["ja"] = {"loss": 5.0 - step, **values}
    return {"stage": "first" if step < 3 else "second", "sources": sources}


VALIDATED = {"sources": {"en": {"loss": 3.5, "perplexity": 33.1}, "ja": {"loss": 4.5, "perplexity": 90.0}}}
