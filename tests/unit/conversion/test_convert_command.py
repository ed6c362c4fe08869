"""tools/convert.py as a user runs it: interrupted, without space, verified and uploaded."""

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from megatron_ext.checkpoint.safetensors import HuggingFaceSink, HuggingFaceSource
from megatron_ext.checkpoint.tensors import MegatronSink, TensorSpec
from megatron_ext.conversion.convert import convert
from megatron_ext.errors import ConversionError
from tests.unit.conversion.hub_server import hub_server
from tests.unit.conversion.test_convert import MODELS, write_checkpoint
from tests.workspace import ROOT, TOOLS, command

SLOWLY = """
import time
from megatron_ext.checkpoint import safetensors
from megatron_ext.command import run_command
from tools.convert import main

read = safetensors.HuggingFaceSource.read

def slowly(*arguments):
    time.sleep(0.5)
    return read(*arguments)

safetensors.HuggingFaceSource.read = slowly
run_command(main)
"""
"""The command itself, on a disk that is slow to read."""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_an_interrupted_conversion_leaves_nothing_that_looks_complete(
    number: signal.Signals, code: int, tmp_path: Path
) -> None:
    convert(write_checkpoint(tmp_path / "megatron", MODELS["dense"]), tmp_path / "hf")
    target = tmp_path / "new" / "back"
    process = subprocess.Popen(
        [sys.executable, "-c", SLOWLY, str(tmp_path / "hf"), str(target), "--workers", "2"],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    while not list(target.glob("*.partial/*.distcp")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == code, stderr
    assert "Traceback" not in stderr
    if number == signal.SIGKILL:
        assert [path.name for path in target.iterdir()] == ["iter_0000000.partial"]
        convert(tmp_path / "hf", target, force=True)
        assert [path.name for path in target.glob("iter_*")] == ["iter_0000000"]
    else:
        assert not target.parent.exists()


@pytest.fixture
def small_files() -> object:
    """No file of this process may grow beyond 20 kB: as on a full disk, writing fails."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("direction", ["to Hugging Face", "to Megatron"])
def test_where_writing_fails_the_output_is_removed(direction: str, tmp_path: Path, small_files: object) -> None:
    source = write_checkpoint(tmp_path / "source", MODELS["dense"])
    if direction == "to Megatron":
        convert(source, tmp_path / "hf")
        source = tmp_path / "hf"
    before = sorted(path.name for path in tmp_path.iterdir())
    small_files()  # type: ignore[operator]
    with pytest.raises(ConversionError, match=r"out: cannot (be written|write decoder\.\S+): File too large"):
        convert(source, tmp_path / "out", workers=3)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_too_little_space_is_said_before_the_work(tmp_path: Path) -> None:
    specs = {"decoder.x": TensorSpec((10**9, 10**9), torch.float32)}
    for sink in (HuggingFaceSink(tmp_path / "out", specs), MegatronSink(tmp_path / "out", specs, {})):
        with pytest.raises(ConversionError, match=r"needs 4000000000\.00 GB, but only [\d.]+ GB are free"), sink:
            raise AssertionError("nothing must be begun")
    assert list(tmp_path.iterdir()) == []


def test_workers_shards_and_verification_are_options(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "megatron", MODELS["MoE"])
    process = command(
        TOOLS / "convert.py",
        source,
        tmp_path / "hf",
        "--workers",
        "3",
        "--shard-size",
        "0.0002",
        "--verify",
        "--dtype",
        "bf16",
    )
    assert process.returncode == 0, process.stderr
    assert "tensors equal bit for bit after rounding to bfloat16" in process.stdout
    assert "MB/s" in process.stderr
    assert len(list((tmp_path / "hf").glob("model-*.safetensors"))) > 2
    process = command(
        TOOLS / "verify.py", source, tmp_path / "hf", "--no-logits", "--figures", tmp_path / "figures.json"
    )
    assert process.returncode == 0, process.stderr
    assert "logits" not in process.stdout
    assert '"rounded_to"' in (tmp_path / "figures.json").read_text()


def test_weights_that_are_code_are_not_read(tmp_path: Path) -> None:
    convert(write_checkpoint(tmp_path / "megatron", MODELS["dense"]), tmp_path / "hf")
    (tmp_path / "hf" / "model.safetensors").rename(tmp_path / "hf" / "pytorch_model.bin")
    process = command(TOOLS / "convert.py", tmp_path / "hf", tmp_path / "back")
    assert process.returncode == 2
    assert "pytorch_model.bin is not read" in process.stderr
    assert "save_pretrained" in process.stderr


# --- upload -------------------------------------------------------------------------------------------------


def push(source: Path, target: Path, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    settings = {"HF_HUB_OFFLINE": "0", "HF_TOKEN": "", "HF_HOME": str(target.parent / "home"), **environment}
    arguments = (TOOLS / "convert.py", source, target, "--push-to-hub", "me/x", *options)
    return command(*arguments, **settings)


def test_a_verified_export_is_uploaded_whole(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "megatron", MODELS["MoE"])
    with hub_server() as hub:
        process = push(source, tmp_path / "hf", "--verify", HF_TOKEN="hf_secret", HF_ENDPOINT=hub.address)
    assert process.returncode == 0, process.stderr
    assert f"uploaded: {hub.address}/me/x" in process.stdout
    assert hub.repositories[0]["private"] is True
    assert hub.tokens == {"Bearer hf_secret"}
    assert "hf_secret" not in process.stdout + process.stderr
    assert hub.files == {path.name: path.read_bytes() for path in (tmp_path / "hf").iterdir()}
    assert b"argmax agreement  100.00%" in hub.files["README.md"]


def test_nothing_is_uploaded_that_is_not_verified(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "megatron", MODELS["dense"])
    with hub_server() as hub:
        settings = {"HF_TOKEN": "hf_secret", "HF_ENDPOINT": hub.address}
        process = push(source, tmp_path / "a", **settings)
        assert (process.returncode, "add --verify" in process.stderr) == (2, True)
        process = push(source, tmp_path / "a", "--verify", "--text", str(tmp_path / "nowhere.jsonl"), **settings)
        assert process.returncode == 2
    assert not hub.tokens, "the hub was asked"
    assert not (tmp_path / "a").exists()


def test_an_upload_that_cannot_be_is_one_clear_error(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "megatron", MODELS["dense"])
    process = push(source, tmp_path / "a", "--verify")
    assert (process.returncode, "no token; set HF_TOKEN" in process.stderr) == (2, True)
    assert not (tmp_path / "a").exists(), "found before the work"
    nobody = {"HF_TOKEN": "hf_secret", "HF_ENDPOINT": "http://127.0.0.1:9"}
    process = push(source, tmp_path / "b", "--verify", "--no-logits", **nobody)
    assert process.returncode == 2
    assert "b is complete, but was not uploaded to me/x: " in process.stderr
    assert "Traceback" not in process.stderr
    with hub_server() as hub:
        hub.refuse = True
        settings = {"HF_TOKEN": "hf_secret", "HF_ENDPOINT": hub.address}
        process = push(source, tmp_path / "c", "--verify", "--no-logits", **settings)
    assert process.returncode == 2
    assert "403" in process.stderr
    assert "hf_secret" not in process.stderr
    assert HuggingFaceSource(tmp_path / "c").specs
