"""Low-rank adapters beside the linear layers of a model: what builds them, and what they compute in every layout."""

from megatron_ext.mcore.adapters.rewrite import NO_ADAPTERS, AdapterPlan, with_adapters

__all__ = ["NO_ADAPTERS", "AdapterPlan", "with_adapters"]
