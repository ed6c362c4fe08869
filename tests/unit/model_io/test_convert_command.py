"""tools/convert.py as a user runs it: interrupted, without space, verified and uploaded."""

import json
import os
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants

from megatron_ext.checkpoint.hf_directory import HuggingFaceSink, HuggingFaceSource
from megatron_ext.checkpoint.streams import MegatronSink, TensorSpec
from megatron_ext.errors import ConversionError
from megatron_ext.locks import LOCK_FILE
from megatron_ext.manifest import MANIFEST_FILE
from megatron_ext.model_io.compare import LogitComparison
from megatron_ext.model_io.convert import convert
from tests.support.checkpoints import MODELS, edit_config, write_checkpoint
from tests.support.commands import in_this_process
from tests.support.waiting import HANGS, ended_at_last, wait_until
from tests.support.workspace import ROOT
from tests.unit.model_io.hub_server import hub_server
from tools import convert as convert_tool
from tools import verify as verify_tool

SLOWLY = """
import signal
import time
from megatron_ext.checkpoint import hf_directory as safetensors
from megatron_ext.command import run_command
from tools.convert import main

signal.signal(signal.SIGINT, signal.default_int_handler)  # processes of a job in the background ignore it
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
    with ended_at_last(process):
        wait_until(lambda: list(target.glob("*.partial/*.distcp")), process=process)
        process.send_signal(number)
        _, stderr = process.communicate(timeout=HANGS)
    assert process.returncode == code, stderr
    assert "Traceback" not in stderr
    if number == signal.SIGKILL:
        assert {path.name for path in target.iterdir()} == {"iter_0000000.partial", LOCK_FILE}
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
    with pytest.raises(ConversionError, match=r"out(/iter_0000000)?: cannot (be written|write \S+): File too large"):
        convert(source, tmp_path / "out", workers=3)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_too_little_space_is_said_before_the_work(tmp_path: Path) -> None:
    specs = {"decoder.x": TensorSpec((10**9, 10**9), torch.float32)}
    for sink in (HuggingFaceSink(tmp_path / "out", specs), MegatronSink(tmp_path / "out", specs, {})):
        with pytest.raises(ConversionError, match=r"needs 4000000000\.00 GB, but only [\d.]+ GB are free"), sink:
            raise AssertionError("nothing must be begun")
    assert list(tmp_path.iterdir()) == []


def test_workers_shards_and_verification_are_options(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    source, target = write_checkpoint(tmp_path / "megatron", MODELS["MoE"]), tmp_path / "hf"
    options = ("--workers", "3", "--shard-size", "0.0002", "--verify", "--dtype", "bf16")
    code, output, errors = in_this_process(convert_tool.main, monkeypatch, capsys, source, target, *options)
    assert code == 0, errors
    assert "tensors equal bit for bit after rounding to bfloat16" in output
    assert re.search(r"converting: [\d.]+ kB in [\d.e-]+ s \([\d.]+ [kM]?B/s\)", errors)
    assert len(list(target.glob("model-*.safetensors"))) > 2
    figures = tmp_path / "figures.json"
    code, output, _ = in_this_process(
        verify_tool.main, monkeypatch, capsys, source, target, "--no-logits", "--figures", figures
    )
    assert (code, "logits" in output) == (0, False)
    written = json.loads(figures.read_text())
    assert written["weights"]["rounded_to"] == ["bfloat16"]
    assert written["verification"] == {"verdict": "the same model"}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("--text corpus.txt", "--text needs --verify"),
        ("--verify --no-logits --text corpus.txt", "--text needs --verify without --no-logits"),
        ("--no-logits", "--no-logits needs --verify"),
        ("--tolerance 1e-3", "--tolerance needs --verify"),
        ("--trust-remote-code", "--trust-remote-code needs --verify"),
        ("--to megatron --shard-size 5", "--shard-size needs a Hugging Face target"),
        ("--no-private", "--no-private needs --push-to-hub"),
        ("--to megatron --verify --push-to-hub me/x", "--push-to-hub needs a Hugging Face target"),
    ],
)
def test_an_option_that_nothing_would_come_of_is_refused(
    options: str, expected: str, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    source = write_checkpoint(tmp_path / "megatron", MODELS["dense"])
    arguments = (source, tmp_path / "out", *options.split())
    code, _, errors = in_this_process(convert_tool.main, monkeypatch, capsys, *arguments)
    assert (code, f"error: {expected}" in errors) == (2, True), errors
    assert not (tmp_path / "out").exists()


def test_text_is_for_logits(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    source = write_checkpoint(tmp_path / "megatron", MODELS["dense"])
    arguments = (source, source, "--no-logits", "--text", "corpus.txt")
    code, _, errors = in_this_process(verify_tool.main, monkeypatch, capsys, *arguments)
    assert (code, "error: --text is for the comparison of logits" in errors) == (2, True), errors


def test_a_tolerance_can_be_too_tight(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    source = write_checkpoint(tmp_path / "megatron", MODELS["MoE"])
    arguments = (source, tmp_path / "hf", "--verify", "--tolerance", "1e-12")
    code, _, errors = in_this_process(convert_tool.main, monkeypatch, capsys, *arguments)
    assert (code, "it would not be the same model" in errors) == (2, True), errors
    assert not (tmp_path / "hf").exists()


def test_a_checkpoint_in_the_other_format_is_no_hugging_face_target(
    tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    convert(write_checkpoint(tmp_path / "megatron", MODELS["dense"]), tmp_path / "hf")
    for options in (("--shard-size", "1"), ("--verify", "--push-to-hub", "me/x")):
        arguments = (tmp_path / "hf", tmp_path / "back", *options)
        code, _, errors = in_this_process(convert_tool.main, monkeypatch, capsys, *arguments)
        assert (code, "needs a Hugging Face target" in errors) == (2, True), errors


def test_another_configuration_is_another_model(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    source, target = write_checkpoint(tmp_path / "megatron", MODELS["dense"]), tmp_path / "hf"
    convert(source, target)
    code, output, _ = in_this_process(verify_tool.main, monkeypatch, capsys, source, target, "--no-logits")
    assert (code, "configuration:" in output) == (0, False)
    edit_config(target, rms_norm_eps=1e-3)
    code, output, _ = in_this_process(verify_tool.main, monkeypatch, capsys, source, target, "--no-logits")
    assert code == 1
    assert f"configuration: layernorm_epsilon is 1e-05 in {source}, 0.001 in {target}" in output
    assert "verdict: NOT the same model" in output


def test_weights_that_are_code_are_not_read(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    convert(write_checkpoint(tmp_path / "megatron", MODELS["dense"]), tmp_path / "hf")
    (tmp_path / "hf" / MANIFEST_FILE).unlink()
    (tmp_path / "hf" / "model.safetensors").rename(tmp_path / "hf" / "pytorch_model.bin")
    code, _, errors = in_this_process(convert_tool.main, monkeypatch, capsys, tmp_path / "hf", tmp_path / "back")
    assert code == 2
    assert "pytorch_model.bin is not read" in errors
    assert "save_pretrained" in errors


# --- upload -------------------------------------------------------------------------------------------------


Push = Callable[..., tuple[int, str, str]]


@pytest.fixture
def push(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Push:
    """The command with --push-to-hub me/x, online, with a token (or none) for a hub at an address."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no login"))

    def run(source: Path, target: Path, *options: str, address: str, token: str = "hf_secret") -> tuple[int, str, str]:
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setenv("HF_TOKEN", token)
        code, output, errors = in_this_process(
            convert_tool.main, monkeypatch, capsys, source, target, "--push-to-hub", "me/x", *options
        )
        assert "hf_secret" not in output + errors
        return code, output, errors

    return run


def test_a_verified_export_is_uploaded_whole(tmp_path: Path, push: Push) -> None:
    source = write_checkpoint(tmp_path / "megatron", MODELS["MoE"])
    with hub_server() as hub:
        code, output, errors = push(source, tmp_path / "hf", "--verify", address=hub.address)
    assert code == 0, errors
    assert f"uploaded: {hub.address}/me/x" in output
    (repository,) = hub.repositories
    assert (repository["name"], repository.get("visibility"), repository.get("private")) in (
        ("x", "private", None),
        ("x", None, True),
    ), "as newer and older versions of the hub's library say it"
    assert hub.tokens == {"Bearer hf_secret"}
    assert hub.files == {path.name: path.read_bytes() for path in (tmp_path / "hf").iterdir()}
    card = hub.files["README.md"].decode()
    assert "argmax agreement  100.00%" in card
    assert "generation: 16 of 16 tokens" in card
    assert "verdict: the same model" in card
    assert "verdict: the same model" in output
    assert 'AutoModelForCausalLM.from_pretrained("me/x"' in card


def test_nothing_is_uploaded_that_is_not_verified(tmp_path: Path, push: Push, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_checkpoint(tmp_path / "megatron", MODELS["dense"])
    with hub_server() as hub:
        code, _, errors = push(source, tmp_path / "a", address=hub.address)
        assert (code, "--push-to-hub needs --verify" in errors) == (2, True)
        monkeypatch.setattr(LogitComparison, "relative", 1.0)
        code, _, errors = push(source, tmp_path / "a", "--verify", address=hub.address)
        assert (code, "it would not be the same model" in errors) == (2, True)
    assert not hub.tokens, "the hub was asked"
    assert not (tmp_path / "a").exists()


def test_an_upload_that_cannot_be_is_one_clear_error(tmp_path: Path, push: Push) -> None:
    source = write_checkpoint(tmp_path / "megatron", MODELS["dense"])
    options, nowhere = ("--verify", "--no-logits"), "http://127.0.0.1:9"
    code, _, errors = push(source, tmp_path / "a", *options, address=nowhere, token="")
    assert (code, "no token; set HF_TOKEN" in errors) == (2, True)
    assert not (tmp_path / "a").exists(), "found before the work"
    code, _, errors = push(source, tmp_path / "b", *options, address=nowhere)
    assert code == 2
    assert "b is complete, but was not uploaded to me/x: " in errors
    with hub_server() as hub:
        hub.refuse = True
        code, _, errors = push(source, tmp_path / "c", *options, address=hub.address)
    assert (code, "403" in errors) == (2, True)
    assert HuggingFaceSource(tmp_path / "c").specs
