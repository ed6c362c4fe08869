"""The README.md of a Hugging Face export: what the model is, how it was trained, how it loads, what was verified."""

import contextlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_ext.architectures.tables.base import Architecture
from megatron_ext.canonical.counts import count_parameters
from megatron_ext.checkpoint.tokenizer_files import has_tokenizer
from megatron_ext.config import ModelConfig
from megatron_ext.config.yaml_text import dump_yaml, parse_yaml
from megatron_ext.errors import ConfigError
from megatron_ext.model_io.model_to_write import ModelToWrite

MODEL_CARD = "README.md"
_TRAINED_WITH = "<summary>The resolved configuration</summary>"


def write_model_card(
    directory: Path,
    name: str,
    architecture: Architecture,
    why: str,
    content: ModelToWrite,
    figures: Sequence[str] | None,
) -> None:
    """Write the card into `directory`, which holds the rest of the export and will be published under `name`."""
    parts = [
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\n---",
        f"# {name}",
        _facts(architecture, why, content),
        _loading(name, architecture, has_tokenizer=has_tokenizer(directory)),
        _verified(figures),
        *([_training(content)] if content.run else []),
        "Exported by megatron_ext.",
    ]
    (directory / MODEL_CARD).write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _facts(architecture: Architecture, why: str, content: ModelToWrite) -> str:
    model, state = content.model, content.state
    counts = count_parameters(model)
    rows = [
        ("class", f"`{architecture.hf_class}`"),
        ("why this class", why),
        ("parameters", f"{counts.total:,} in all, {counts.active:,} active for each token"),
        ("layers, width, heads", f"{model.num_layers}, {model.hidden_size}, {model.num_attention_heads}"),
        ("vocabulary", f"{model.vocab_size:,}"),
        ("positions", f"{model.max_position_embeddings:,}"),
    ]
    if model.is_moe:
        rows.append(("experts", _experts(model)))
    if content.made_of:
        rows.append(("made of", content.made_of))
    if state.iteration:
        length = content.run.get("data", {}).get("sequence_length")
        count = state.consumed_samples * length if length else 0
        if state.plan is not None:  # its stages may have lengths of their own
            count = sum(part["samples"] * part["sequence_length"] for part in state.plan["stages"])
        tokens = f", {count:,} tokens" if count else ""
        rows.append(("trained", f"{state.iteration:,} steps{tokens}"))
    return "\n".join(["| | |", "|---|---|", *(f"| {key} | {value.replace('|', '&#124;')} |" for key, value in rows)])


def _experts(model: ModelConfig) -> str:
    layers = sum(model.moe_layer_pattern)
    text = f"{model.num_moe_experts} in {layers} of {model.num_layers} layers, {model.moe_router_topk} a token"
    shared = model.moe_shared_expert_intermediate_size
    return text if shared is None else f"{text}, and a shared one of width {shared}"


def _loading(name: str, architecture: Architecture, *, has_tokenizer: bool) -> str:
    classes = ["AutoModelForCausalLM", *(["AutoTokenizer"] if has_tokenizer else [])]
    trust = ", trust_remote_code=True" if architecture.auto_map else ""
    code = [
        f"from transformers import {', '.join(classes)}",
        "",
        f'model = AutoModelForCausalLM.from_pretrained("{name}", dtype="auto"{trust})',
        *([f'tokenizer = AutoTokenizer.from_pretrained("{name}"{trust})'] if has_tokenizer else []),
    ]
    parts = ["## Loading", "```python\n" + "\n".join(code) + "\n```", _code_note(architecture)]
    return "\n\n".join(part for part in parts if part)


def _code_note(architecture: Architecture) -> str:
    """Where the modelling code is to be had; empty where transformers has it."""
    if architecture.code:
        return "Its modelling code is in this directory; `trust_remote_code` runs it."
    if architecture.remote is None:
        return ""
    where = f"[{architecture.remote}](https://huggingface.co/{architecture.remote})"
    return f"Its modelling code is in {where}; `trust_remote_code` fetches and runs it."


def _verified(figures: Sequence[str] | None, other: str = "the model it was made of, before it was published") -> str:
    if figures is None:
        return "## Verification\n\nNot compared with the model it was made of."
    lines = "\n".join(figures)
    return f"## Verification\n\nCompared with {other}:\n\n```\n{lines}\n```"


def replace_verification(directory: Path, figures: Sequence[str]) -> None:
    """Put newer figures into the card of `directory`, if it has one of ours; the file is replaced, not written into."""
    card = directory / MODEL_CARD
    # People add to a card with any editor: what is not UTF-8 stays what it is.
    before = card.read_text(encoding="utf-8", errors="surrogateescape") if card.is_file() else ""
    after = re.sub(r"^## Verification\n.*?(?=^## |^Exported by |\Z)", "", before, flags=re.M | re.S)
    start = re.search(r"^## Verification$", before, flags=re.M)
    if start is not None:
        card.unlink()
        at = start.start()
        section = _verified(figures, "megatron-core's model of the same weights, when its modelling code was renewed")
        card.write_text(f"{after[:at]}{section}\n\n{after[at:]}", encoding="utf-8", errors="surrogateescape")


def run_of_card(directory: Path) -> dict[str, Any]:
    """The configuration of training that a card of ours in `directory` has; empty where there is none."""
    card = directory / MODEL_CARD
    with contextlib.suppress(OSError, UnicodeDecodeError, ConfigError):
        text = card.read_text(encoding="utf-8")
        if found := re.search(rf"^{re.escape(_TRAINED_WITH)}\n+```yaml\n(.*?)^```$", text, flags=re.M | re.S):
            run = parse_yaml(found[1], source=str(card))
            return run if isinstance(run, dict) else {}
    return {}


def _training(content: ModelToWrite) -> str:
    return f"## Training\n\n<details>\n{_TRAINED_WITH}\n\n```yaml\n{dump_yaml(content.run).strip()}\n```\n\n</details>"
