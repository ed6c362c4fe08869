"""The files of a tokenizer, whatever kind it is: which of a folder's they are, and their copying."""

import ast
import json
import shutil
from pathlib import Path
from typing import Any

from megatron_ext.errors import CheckpointError
from megatron_ext.files import read_json_object

FAST_FILE, MODEL_FILE = "tokenizer.json", "tokenizer.model"
SETTINGS_FILE, SPECIAL_FILE, ADDED_FILE = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
TOKENIZERS = (FAST_FILE, MODEL_FILE)
"""Files of which a tokenizer mostly has at least one."""
PIECE_FILES = (MODEL_FILE, "spiece.model", "sentencepiece.bpe.model")
"""Names of SentencePiece models."""
_READABLE = (*((name,) for name in (FAST_FILE, *PIECE_FILES, "vocab.txt")), ("vocab.json", "merges.txt"))
"""Files that are a tokenizer together, which transformers reads with a class of its own."""
TOKENIZER_FOLDER = "tokenizer"
"""Where a Megatron checkpoint has them."""
GENERATION_FILE = "generation_config.json"
MODEL_CONFIG = "config.json"
VOCABULARIES = (
    *("tokenizer.json", "tekken.json", "vocab*.json", "vocab*.txt", "merges*.txt", "dict*.txt", "emoji.json"),
    *("*.model", "*.model.v*", "*.tiktoken", "*.spm", "*.vocab", "*.bpe", "*.codes"),
)
"""Patterns of files that say which tokens there are and how text is cut into them."""
TEMPLATE_FOLDERS = ("additional_chat_templates", "chat_templates")
TOKENIZER_FILES = (
    *VOCABULARIES,
    *("tokenizer*.json", SPECIAL_FILE, ADDED_FILE, "chat_template*", GENERATION_FILE, "tokenization_*.py"),
)
"""Patterns of what is kept of a tokenizer's folder; how to stop and sample goes with it."""


def tokenizer_files(directory: Path) -> list[Path]:
    """The files of the tokenizer in `directory`, relative to it: its code and chat templates too, none of it run."""
    if not directory.is_dir():
        return []
    found = {path for pattern in TOKENIZER_FILES for path in directory.glob(pattern)}
    found |= {path for folder in TEMPLATE_FOLDERS for path in (directory / folder).glob("*.jinja")}
    found |= _code(directory)
    return sorted(path.relative_to(directory) for path in found if path.is_file())


def has_tokenizer(directory: Path) -> bool:
    """Whether `directory` holds a tokenizer in files that need no code beside them."""
    return any(all((directory / name).is_file() for name in names) for names in _READABLE)


def says_of_tokens(directory: Path) -> bool:
    """Whether `directory` has anything that `copy_tokenizer` keeps: files of a tokenizer, or ids of single tokens."""
    return bool(tokenizer_files(directory)) or any(name.endswith("_token_id") for name in said_of_tokens(directory))


def copy_tokenizer(source: Path, target: Path) -> bool:
    """Copy the tokenizer's files of `source` into the folder `target`; whether it is one by `has_tokenizer`.

    What a config.json of `source` says of tokens is kept, since transformers reads some tokenizers by it.
    """
    for name in tokenizer_files(source):
        (target / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(source / name, target / name)
    said = said_of_tokens(source)
    if said and not (target / MODEL_CONFIG).exists():
        (target / MODEL_CONFIG).write_text(json.dumps(said, indent=2) + "\n", encoding="utf-8")
    return has_tokenizer(target)


def said_of_tokens(directory: Path) -> dict[str, Any]:
    """What config.json in `directory` says of the tokenizer's class and of single tokens; empty without one."""
    try:
        config = read_json_object(directory / MODEL_CONFIG, CheckpointError)
    except CheckpointError:
        return {}  # who reads the model itself says what is wrong with it
    return {
        name: value
        for name, value in config.items()
        if name.endswith("_token_id") or name in ("model_type", "tokenizer_class")
    }


def _code(directory: Path) -> set[Path]:
    """The modules that tokenizer_config.json names, and those beside them that they import."""
    try:
        named = read_json_object(directory / SETTINGS_FILE, CheckpointError).get("auto_map")
    except CheckpointError:
        return set()
    classes = named.get("AutoTokenizer") if isinstance(named, dict) else named
    classes = classes if isinstance(classes, list) else [classes]
    waiting = [name.rpartition(".")[0] for name in classes if isinstance(name, str)]
    found: set[Path] = set()
    while waiting:
        path = directory / f"{waiting.pop()}.py"
        if path.stem.isidentifier() and path.is_file() and path not in found:
            found.add(path)
            waiting += _imported_beside(path)
    return found


def _imported_beside(path: Path) -> list[str]:
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return []
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level == 1]
    return [name for node in imports for name in ([node.module] if node.module else [a.name for a in node.names])]
