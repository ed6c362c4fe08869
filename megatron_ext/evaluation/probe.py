"""A look at one checkpoint: texts that it writes to fixed prompts, and its loss on texts that it must not forget."""

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from megatron_ext.evaluation.samples import sample_metrics
from megatron_ext.evaluation.text_loss import text_loss, windows_of
from megatron_ext.files import write_text
from megatron_ext.generation.prompts import Prompt
from megatron_ext.generation.sample import Continuing, continued
from megatron_ext.generation.text_model import TextModel
from megatron_ext.monitoring.report.evaluations import SAMPLES_FILE


def probe(
    model: TextModel,
    prompts: Sequence[Prompt],
    how: Continuing,
    texts: Mapping[str, Iterable[str]],
    *,
    window: int | None = None,
    stride: int | None = None,
) -> Iterator[dict[str, float]]:
    """Yield metrics by name: `samples/...` of what it writes, then `text/NAME/...` of each text.

    In an evaluation beside a run, what it writes is kept in the evaluation's folder.

    Args:
        texts: documents by the name of their text.
    """
    if prompts:
        made = list(continued(model, prompts, how))
        if folder := os.environ.get("EVALUATION_DIRECTORY"):
            rows = [
                {"prompt": one.prompt.text, "continuation": one.text, "tokens": one.tokens, "ended": one.ended}
                for one in made
            ]
            write_text(Path(folder) / SAMPLES_FILE, json.dumps(rows, ensure_ascii=False, indent=2) + "\n")
        yield {f"samples/{name}": value for name, value in sample_metrics(made).items()}
    windows = windows_of(model, window, stride)
    for name, documents in texts.items():
        found = text_loss(model, documents, windows, batch_size=how.batch_size)
        yield {
            f"text/{name}/{figure}": value
            for figure, value in found.record().items()
            if figure in ("loss", "bits_per_byte", "bits_per_byte_interval") and value is not None
        }
