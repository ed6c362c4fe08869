"""The run that a prepared dataset asks for."""

import json
from pathlib import Path

import numpy as np
import pytest

from megatron_ext.data.indexed import write_index
from megatron_ext.errors import ConversionError
from megatron_ext.model_io.prepared_data import sections_for


def test_pairs_are_as_long_as_both_of_their_answers(tmp_path: Path) -> None:
    """Not twice as long as the longest of all answers."""
    write_index(tmp_path / "train.idx", np.array([300, 150, 200, 200]), np.dtype(np.uint16))
    said = {"kind": "preference", "splits": {"train": {"documents": 4, "tokens": 850, "longest": 300}}}
    (tmp_path / "dataset.json").write_text(json.dumps(said), encoding="utf-8")
    assert sections_for(tmp_path, 450, None)["data"]["sequence_length"] == 450
    with pytest.raises(ConversionError, match=r"has a pair .* of 450 tokens, .* --max-tokens 200"):
        sections_for(tmp_path, 400, None)
