"""Command lines. In an installed copy they are `python -m megatron_ext.tools.train` and so on."""
