"""Modelling code in a Hugging Face directory is run if it is ours to the byte, or if the user trusts it."""

from pathlib import Path

import pytest

from megatron_ext.errors import ConversionError
from megatron_ext.model_io.convert import convert
from megatron_ext.model_io.huggingface.companion_files import shipped_code
from megatron_ext.model_io.logits import load_hugging_face
from tests.support.checkpoints import MODELS, edit_config, write_checkpoint


def test_changed_code_is_not_run_unasked(tmp_path: Path) -> None:
    convert(write_checkpoint(tmp_path / "megatron", MODELS["MoE"]), tmp_path / "hf")
    path = tmp_path / "hf" / "modeling_megatron_ext.py"
    for end in (b"\nprint('changed')\n", b"\n# caf\xe9\n"):  # the second is not even UTF-8
        path.write_bytes(shipped_code(path.name).encode() + end)
        with pytest.raises(ConversionError, match="pass --trust-remote-code"):
            load_hugging_face(tmp_path / "hf")


@pytest.mark.parametrize("place", ["../elsewhere--modeling_evil.Model", "sub/modeling_evil.Model"])
def test_code_that_config_names_elsewhere_is_not_run_unasked(place: str, tmp_path: Path) -> None:
    convert(write_checkpoint(tmp_path / "megatron", MODELS["MoE"]), tmp_path / "hf")
    edit_config(tmp_path / "hf", auto_map={"AutoModelForCausalLM": place})
    with pytest.raises(ConversionError, match="pass --trust-remote-code"):
        load_hugging_face(tmp_path / "hf")


def test_code_in_a_subfolder_is_not_run_unasked(tmp_path: Path) -> None:
    convert(write_checkpoint(tmp_path / "megatron", MODELS["MoE"]), tmp_path / "hf")
    (tmp_path / "extras").mkdir()
    (tmp_path / "extras" / "generate.py").write_text("raise SystemExit('foreign code ran')")
    (tmp_path / "hf" / ".cache").mkdir()  # left by download tools; nothing looks for code there
    load_hugging_face(tmp_path / "hf")
    (tmp_path / "hf" / "custom_generate").symlink_to(tmp_path / "extras")
    with pytest.raises(ConversionError, match="pass --trust-remote-code"):
        load_hugging_face(tmp_path / "hf")
