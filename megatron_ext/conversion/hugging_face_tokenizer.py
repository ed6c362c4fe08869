"""The tokenizer of a folder as transformers loads it."""

from pathlib import Path
from typing import Any

from megatron_ext.errors import DataError


def load_tokenizer(directory: str | Path, *, trust_remote_code: bool = False) -> Any:
    """Transformers' tokenizer of `directory`. An export of ours brings none of its own code, so none is run unasked.

    Raises:
        DataError: there is none that transformers can use.
    """
    from transformers import AutoTokenizer  # slow to import

    try:
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, ImportError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise DataError(f"{directory}: no tokenizer here that transformers can use ({reason})") from error
