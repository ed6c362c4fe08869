"""Exports of other versions get this version's modelling code, and nothing else of theirs is touched."""

import json
from pathlib import Path

import pytest
import torch

from megatron_ext.errors import ConversionError
from megatron_ext.manifest import MANIFEST_FILE, check_manifest, write_manifest
from megatron_ext.model_io.compare import Comparison
from megatron_ext.model_io.convert import convert
from megatron_ext.model_io.huggingface.companion_files import shipped_code
from megatron_ext.model_io.huggingface.refresh import refresh_code
from megatron_ext.model_io.logits import load_hugging_face
from tests.support.commands import in_this_process
from tests.unit.model_io.own_models import MODELS, export, tokens, write_checkpoint
from tools import convert as convert_tool

NAME = "DeepSeek-V3 with normalized gating"
CODE = "modeling_megatron_ext.py"


@pytest.fixture
def older(tmp_path: Path) -> Path:
    """An export as another version may have left it: other code, more of it, named elsewhere, a file of the user's."""
    directory = export(tmp_path, NAME)[1]
    (directory / MANIFEST_FILE).unlink()
    (directory / CODE).write_text("raise SystemExit('this is old code')\n")
    (directory / "modeling_megatron_ext_router.py").write_text("# of an earlier version\n")
    (directory / "my notes").mkdir()
    (directory / "my notes" / "a.txt").write_text("mine")
    config = json.loads((directory / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": f"me/x--{CODE.removesuffix('.py')}.MegatronExtForCausalLM"}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def test_the_code_is_this_versions_and_the_weights_the_same_file(older: Path) -> None:
    weights = older / "model.safetensors"
    write_manifest(older)
    before, config = weights.stat(), json.loads((older / "config.json").read_text())
    others = {path.name for path in older.iterdir()}
    with pytest.raises(ConversionError, match="--refresh-code"):
        load_hugging_face(older)
    changed, verification = refresh_code(older)
    assert changed == [CODE, "modeling_megatron_ext_router.py", "config.json"]
    assert verification is None
    assert (weights.stat().st_ino, weights.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert {path.name for path in older.iterdir()} == others - {"modeling_megatron_ext_router.py"}
    assert (older / "my notes" / "a.txt").read_text() == "mine"
    assert (older / CODE).read_text() == shipped_code(CODE)
    again = json.loads((older / "config.json").read_text())
    assert again.pop("auto_map") != config.pop("auto_map")
    assert again == config
    assert [path.name for path in older.parent.iterdir() if "partial" in path.name] == []
    assert refresh_code(older)[0] == []
    assert check_manifest(older, ConversionError, checksums=True)
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    (older / CODE).write_text("# old once more\n")
    refresh_code(older)
    with pytest.raises(ConversionError, match="model.safetensors"):
        check_manifest(older, ConversionError, checksums=True)


def test_a_fault_of_the_weights_is_told_of_the_directory_that_people_know(older: Path) -> None:
    weights = older / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(ConversionError, match=rf"{weights}: cannot be read as safetensors"):
        refresh_code(older, Comparison(batches=1, length=24))
    assert [path.name for path in older.parent.iterdir() if "partial" in path.name] == []


def test_it_is_compared_with_megatron_and_the_card_says_so(older: Path) -> None:
    (older / "my notes" / "a.txt").unlink()
    (older / "my notes").rmdir()
    write_manifest(older)
    (older / CODE).write_text("# by hand, which the manifest does not know\n")
    _, verification = refresh_code(older, Comparison(batches=1, length=24))
    assert verification is not None
    assert verification.passed
    assert verification.generation is not None
    assert verification.generation.tokens == 16
    card = (older / "README.md").read_text()
    assert card.count("## Verification") == 1
    assert "when its modelling code was renewed" in card
    assert "verdict: the same model" in card
    assert card.endswith("Exported by megatron_ext.\n")
    with torch.no_grad():
        assert load_hugging_face(older)(tokens()).logits.isfinite().all()


def test_code_that_computes_something_else_leaves_the_directory_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = export(tmp_path, NAME)[1]
    before = {path.name: path.read_bytes() for path in directory.iterdir()}

    def edit(name: str) -> str:
        return shipped_code(name).replace("cache=_one_cache(", "cache=None and _one_cache(")

    for module in ("huggingface.refresh", "logits"):
        monkeypatch.setattr(f"megatron_ext.model_io.{module}.shipped_code", edit)
    with pytest.raises(ConversionError, match="(?s)left as it is; .*NOT to be used") as raised:
        refresh_code(directory, Comparison(batches=1, length=24))
    assert "16 tokens" in str(raised.value)
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "megatron"]


def test_what_is_not_ours_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: object) -> None:
    source = write_checkpoint(tmp_path / "megatron", MODELS["dense"])
    convert(source, tmp_path / "hf", hf_class="MegatronExtForCausalLM")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config | {"architectures": ["LlamaForCausalLM"]}))
    for arguments, expected in (
        ((source, "--refresh-code"), "it has no config.json"),
        (
            (tmp_path / "hf", "--refresh-code"),
            "architectures = ['LlamaForCausalLM']; only exports of MegatronExtForCaus",
        ),
        ((tmp_path / "hf", tmp_path / "b", "--refresh-code"), "target is not for --refresh-code"),
        ((tmp_path / "hf", "--refresh-code", "--dtype", "bf16"), "--dtype is not for --refresh-code"),
        ((tmp_path / "hf", "--refresh-code", "--push-to-hub", "me/x"), "--push-to-hub needs --verify"),
        ((tmp_path / "hf",), "target: a directory to write is required"),
    ):
        code, _, errors = in_this_process(convert_tool.main, monkeypatch, capsys, *arguments)  # type: ignore[arg-type]
        assert (code, expected in errors) == (2, True), errors
