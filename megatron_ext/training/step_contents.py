"""What a step of a run reads, from the stream that training uses: source, place and text of every sample."""

import contextlib
import itertools
from collections.abc import Iterator

import torch
import torch.distributed as dist

from megatron_ext.config import RunConfig
from megatron_ext.data.inspect.documents import shortened, text_of
from megatron_ext.data.inspect.rows import marked
from megatron_ext.data.stream.position import Position
from megatron_ext.data.tokenizer import Tokenizer
from megatron_ext.errors import ConfigError
from megatron_ext.training.data import open_data
from megatron_ext.training.session import starting_state


def show_step(run: RunConfig, step: int, *, most: int, characters: int, coloured: bool = False) -> Iterator[str]:
    """Lines for people: the samples of `step`, counted from 1, in the order in which they are read.

    What a checkpoint of the run says it has read is taken into account. No model is built.

    Args:
        most: samples to show.
        characters: of each.
        coloured: the reader is a terminal: what of conversations is trained on is shown in colour.

    Raises:
        ConfigError: the run has no such step.
    """
    tokenizer = Tokenizer(run.data.tokenizer)
    with _alone() as group:
        data = open_data(run, starting_state(run), group, torch.device("cpu"))
        steps = data.plan.total_steps
        if not 1 <= step <= steps:
            raise ConfigError(f"step = {step}: the run has the steps 1 to {steps}")
        first = data.plan.samples_at(step - 1)
        stage = data.plan.stage_of_step(step - 1)
        try:
            data.train.seek(Position(first))
            micro_batches = data.train.next()
            rows = [row.tolist() for micro in micro_batches for row in micro.tokens]
            masks = [row.tolist() for micro in micro_batches for row in micro.loss_mask]
            yield f"step {step} of {steps}, stage {stage.name}: samples {first:,} to {first + len(rows) - 1:,}"
            for sample, tokens, mask in zip(itertools.count(first), rows[:most], masks, strict=False):
                place = data.train.place(sample)
                yield (
                    f"\nsample {sample:,}: {place.source}, sample {place.number:,} of it, epoch {place.epoch}; "
                    f"{place.where}"
                )
                if run.task.reads != "text":  # the mask of a token stands where it is predicted
                    counts = [False, *(weight > 0 for weight in mask[:-1])]
                    yield shortened(marked(tokens, counts, tokenizer, coloured=coloured), characters)
                else:
                    yield shortened(text_of(tokens, tokenizer), characters)
            if len(rows) > most:
                yield f"\nand {len(rows) - most:,} more; --samples {len(rows)} shows all"
        finally:
            data.close()


@contextlib.contextmanager
def _alone() -> Iterator[dist.ProcessGroup]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        assert dist.group.WORLD is not None
        yield dist.group.WORLD
    finally:
        dist.destroy_process_group()
