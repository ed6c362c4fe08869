"""Sections of runs that several tests of rules begin with."""

from typing import Any

MOE = {"num_moe_experts": 8}
LATENT = {"kv_lora_rank": 8, "qk_head_dim": 8, "qk_pos_emb_head_dim": 4, "v_head_dim": 8}
LLAMA3 = {"kind": "llama3", "factor": 8.0, "original_max_position_embeddings": 1024}
YARN = {"kind": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
PRE = {"moe_router_pre_softmax": True}
TE = {"backend": "transformer_engine"}


def fp8(recipe: str, **fields: Any) -> dict[str, Any]:
    return {"kind": "fp8", "recipe": recipe, **fields}


STAGED = {"train": [], "cache_dir": None, "sources": {"ja": {"path": "a"}, "en": {"path": "b"}}}
ONE_STAGE = {**STAGED, "stages": [{"name": "all", "mix": {"ja": 1}, "steps": 2}]}

ADAPTED: dict[str, dict[str, Any]] = {"adapters": {}, "checkpoint": {"initialize_from": "base"}}
EVERYTHING = {"targets": [{"match": ["*"]}]}

MAIL = {"host": "smtp.example.org", "sender": "training@example.org", "recipients": ["team@example.org"]}
