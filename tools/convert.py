#!/usr/bin/env python
"""Convert a checkpoint between Megatron and Hugging Face; the direction follows from what SOURCE is.

  python tools/convert.py MEGATRON_CHECKPOINT HF_DIRECTORY
  python tools/convert.py HF_DIRECTORY MEGATRON_CHECKPOINT
  python tools/convert.py HF_DIRECTORY MEGATRON_CHECKPOINT --data PREPARED_CHATS
  python tools/convert.py RUN HF_DIRECTORY --dtype bf16 --verify --push-to-hub USER/NAME
  python tools/convert.py RUN SMALLER_RUN --to megatron --dtype bf16
  python tools/convert.py TIED_MODEL MEGATRON_CHECKPOINT --to megatron --untie
  python tools/convert.py HF_DIRECTORY --refresh-code --verify

One process, no GPU, a few tensors in memory. Every tensor is accounted for, or nothing is written.
Beside a Megatron target stands a training configuration, TARGET.yaml.
"""

from typing import TYPE_CHECKING

from megatron_ext.command import ending_on_sigterm, parse_command, prefer_huge_pages, run_command
from megatron_ext.model_io.options import ConvertOptions, refuse_unused

if TYPE_CHECKING:  # importing them takes seconds, which --help does without
    from megatron_ext.model_io.compare import Comparison, Verification


def main() -> None:
    """Parse the command line and convert."""
    o = parse_command(ConvertOptions, __doc__, positional=["source", "target"])
    prefer_huge_pages()
    from megatron_ext.model_io.compare import Comparison
    from megatron_ext.model_io.convert import goes_to_hugging_face
    from megatron_ext.model_io.figures import lines_of
    from megatron_ext.model_io.huggingface.hub import push_to_hub, require_hub
    from megatron_ext.model_io.huggingface.refresh import refresh_code

    to_hf = o.refresh_code or goes_to_hugging_face(o.source, o.to, o.hf_class)
    refuse_unused(o, to_hugging_face=to_hf)
    if o.push_to_hub is not None:
        require_hub(o.push_to_hub)
    how = Comparison(o.logits, o.text, tolerance=o.tolerance or 1e-5, trust_remote_code=o.trust_remote_code)
    exported = o.source if o.target is None else o.target
    if o.refresh_code:
        with ending_on_sigterm():
            changed, verification = refresh_code(o.source, how if o.verify else None)
        print(f"{exported}: {', '.join(changed) or 'nothing'} changed, weights as they were")
    else:
        verification = _convert(o, exported, how)
    if verification is not None:
        print(*lines_of(verification), sep="\n")
    if o.push_to_hub is not None:
        print(f"uploaded: {push_to_hub(exported, o.push_to_hub, private=o.private)}")


def _convert(o: ConvertOptions, target: str, how: "Comparison") -> "Verification | None":
    """Convert and say what was done; returns the verification, where one was asked for."""
    from megatron_ext.model_io.convert import convert
    from megatron_ext.progress import byte_progress

    with ending_on_sigterm(), byte_progress("converting") as progress:
        done = convert(
            o.source,
            target,
            to=o.to,
            hf_class=o.hf_class,
            dtype=o.dtype,
            tokenizer=o.tokenizer,
            shard_bytes=int((o.shard_size or 5.0) * 1e9),
            workers=o.workers,
            force=o.force,
            data=o.data,
            untie=o.untie,
            verify=how if o.verify else None,
            name=o.push_to_hub,
            progress=progress,
        )
    print(f"{target}: {done.direction}, {done.written.tensors:,} tensors, {done.written.bytes / 1e6:,.1f} MB")
    print(f"architecture: {done.why}")
    if done.recipe is not None:
        print(f"training configuration: {done.recipe}", *done.notes, sep="\n  ")
    return done.written.verification


if __name__ == "__main__":
    run_command(main)
