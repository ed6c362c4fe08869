"""Processes and devices: where a run computes, how its processes find each other, and what they log."""

from megatron_ext.runtime.cpu_compat import keep_compiler_out, keep_transformer_engine_out

# Here, since every package that imports megatron-core imports this one first.
keep_transformer_engine_out()
keep_compiler_out()
