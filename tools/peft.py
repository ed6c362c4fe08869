#!/usr/bin/env python
"""Adapters to and from the PEFT library; the direction follows from what SOURCE is.

  python tools/peft.py runs/sft adapters --base BASE_HF
  python tools/peft.py PEFT_DIRECTORY runs/on --base BASE_HF

What is imported is a checkpoint of adapters: tools/merge_lora.py merges it. A run trains it on with
checkpoint.directory: runs/on, checkpoint.load_optimizer: false, the base as checkpoint.initialize_from and the section
adapters that runs/on/iter_0000000/run.yaml has.
"""

from pathlib import Path

from megatron_ext.command import ending_on_sigterm, parse_command, run_command
from megatron_ext.errors import ConfigError
from megatron_ext.model_io.peft.options import PeftOptions


def main() -> None:
    """Parse the command line and write."""
    o = parse_command(PeftOptions, __doc__, positional=["source", "target"])
    imports = (Path(o.source) / "adapter_config.json").is_file()
    for name, wrong, why in (("layout", imports, "an import"), ("precision", not imports, "an export")):
        if wrong and getattr(o, name) is not None:
            raise ConfigError(f"{name} = {getattr(o, name)}: has no effect on {why}; remove it")
    with ending_on_sigterm():
        if imports:
            _import(o)
        else:
            _export(o)


def _export(o: PeftOptions) -> None:
    from megatron_ext.merging.lora import base_stream
    from megatron_ext.model_io.adapters import open_adapters
    from megatron_ext.model_io.open import open_checkpoint, read_hugging_face_model
    from megatron_ext.model_io.peft.export import export_peft
    from megatron_ext.progress import byte_progress

    architecture, _ = read_hugging_face_model(o.base)
    adapters = open_adapters(o.source)
    base_stream(adapters, open_checkpoint(o.base), byte_progress)
    tensors = export_peft(adapters, architecture, o.target, o.base, o.layout or "stacked", force=o.force)
    print(f"{o.target}: {len(adapters.pairs):,} adapters for {architecture.hf_class} in {tensors:,} tensors")
    if o.layout == "experts" and architecture.stacked:
        print(
            "warning: PEFT 0.19 and newer with transformers 5 leave such adapters out without an error, but for "
            "Mixtral's; this layout is for older ones"
        )


def _import(o: PeftOptions) -> None:
    from megatron_ext.model_io.peft.read import import_peft
    from megatron_ext.model_io.write import DTYPES
    from megatron_ext.progress import byte_progress

    with byte_progress("looking at the base") as progress:
        adapters = import_peft(o.source, o.target, o.base, DTYPES[o.precision or "bf16"], progress, force=o.force)
    print(f"{o.target}: {adapters:,} adapters")


if __name__ == "__main__":
    run_command(main)
