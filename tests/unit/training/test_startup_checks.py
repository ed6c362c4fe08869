"""What is found before a run starts: faults of the configuration and of files in one message, and what it would do."""

import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_ext.checkpoint.find import require_checkpoint
from megatron_ext.checkpoint.torch_dist import TorchDistReader
from megatron_ext.config import RunConfig, load_config, load_run, read_yaml
from megatron_ext.config.load import values_of
from megatron_ext.data.prepare.preprocess import preprocess
from megatron_ext.data.tokenizer import train_tokenizer
from megatron_ext.errors import ConfigError
from megatron_ext.model_io.convert import convert
from megatron_ext.model_io.starting_weights import open_hugging_face
from megatron_ext.planning.memory import checkpoint_bytes
from megatron_ext.planning.room import bytes_on_disk
from megatron_ext.training import data_files
from megatron_ext.training.findings import Findings
from megatron_ext.training.show_plan import show_plan
from megatron_ext.training.startup_checks import check_run, examine
from tests.support.commands import TOOLS, command, train
from tests.support.workspace import prepare_data, run_mapping, write_run


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared data, and a run of 2 steps."""
    directory = tmp_path_factory.mktemp("work")
    prepare_data(directory)
    # A schedule that does not mind how long the run is.
    write_run(directory / "run.yaml", run_mapping(directory) | {"schedule": {"kind": "wsd", "warmup_iters": 2}})
    process = train(1, directory / "run.yaml", "train.train_iters=2")
    assert process.returncode == 0, process.stderr
    (directory / "said").write_text(process.stderr)
    return directory


def found(work: Path, *overrides: str) -> Findings:
    run = load_run(work / "run.yaml", overrides)
    return examine(values_of(run), run, open_hugging_face)


def check(work: Path, *overrides: str, world_size: int | None = None, files: bool = True) -> str:
    return check_run(str(work / "run.yaml"), overrides, world_size, files=files, open_foreign=open_hugging_face)


def new(work: Path) -> str:
    return f"checkpoint.directory={work / 'another'}"


def test_faults_of_configuration_and_files_come_in_one_message(work: Path, tmp_path: Path) -> None:
    mapping = run_mapping(work)
    mapping["model"]["num_layers"] = "four"
    mapping["data"] |= {"tokenizer": "nowhere", "train": [{"path": "missing/train"}, {"path": str(work / "data")}]}
    mapping["data"]["train"].append({"path": "x", "wieght": 2})
    mapping["checkpoint"] = {"directory": str(work / "another"), "initialize_from": "gone"}
    mapping["logging"] = {"metrics_file": str(work / "run.yaml" / "metrics.jsonl")}
    process = command(TOOLS / "train.py", write_run(tmp_path / "run.yaml", mapping), "--check")
    assert process.returncode == 2
    assert process.stdout == ""
    assert process.stderr.count("error: ") == 1
    assert "run.yaml: 7 problems" in process.stderr
    here = Path.cwd()
    for part in (
        "model.num_layers = 'four': must be an integer",
        "data.train.2.wieght = 2: unknown key; did you mean 'weight'?",
        f"data.tokenizer = nowhere (= {here}/nowhere): no tokenizer here "
        "(no such folder; one of the Hugging Face hub: `hf download` it first)",
        f"data.train.0.path = missing/train (= {here}/missing/train): is not there; prepare it with",
        f"data.train.1.path = {work}/data: is a folder; name a split in it",
        f"checkpoint.initialize_from = gone (= {here}/gone): is not there",
        f"logging.metrics_file = {work}/run.yaml/metrics.jsonl: {work}/run.yaml is a file, not a folder",
    ):
        assert part in process.stderr
    assert not list(tmp_path.glob("[!r]*")), "something was written"


def test_several_faults_of_a_layout_are_counted_one_by_one(work: Path) -> None:
    fault = r"run\.yaml: 2 problems\n  13 processes .*\n  train\.global_batch_size = 8 is"
    with pytest.raises(ConfigError, match=fault):
        check(work, "parallel.pipeline_model_parallel_size=2", world_size=13, files=False)


def test_the_real_run_makes_the_same_checks_before_it_builds_anything(work: Path) -> None:
    process = train(1, work / "run.yaml", new(work), "model.vocab_size=300", "checkpoint.initialize_from=gone")
    assert process.returncode == 2
    assert "2 problems" in process.stderr
    assert "tokens, more than model.vocab_size = 300; raise that" in process.stderr
    assert "checkpoint.initialize_from = gone" in process.stderr
    assert "Traceback" not in process.stderr
    assert not (work / "another").exists()


@pytest.mark.parametrize("option", [["--world-size", "2"], ["--config-only"]])
def test_options_of_the_check_are_refused_without_it(work: Path, option: list[str]) -> None:
    process = command(TOOLS / "train.py", work / "run.yaml", *option)
    assert process.returncode == 2
    assert f"{option[0]} needs --check" in process.stderr


def test_a_folder_where_metrics_are_written_is_a_fault(work: Path) -> None:
    assert found(work, new(work), f"logging.metrics_file={work}").faults == [
        f"logging.metrics_file = {work}: is a folder, where a file is written"
    ]


def test_a_second_place_that_can_never_be_written_is_a_fault(work: Path) -> None:
    file = work / "run.yaml"
    assert found(work, f"checkpoint.copy_to={file}/x").faults == [
        f"checkpoint.copy_to = {file}/x: {file} is a file, not a folder"
    ]
    (fault,) = found(work, "checkpoint.copy_to=nowhere://x").faults  # also where the run has checkpoints
    assert "checkpoint.copy_to = nowhere://x: cannot be opened: Protocol not known: nowhere" in fault


def test_another_tokenizer_and_short_data_are_faults(work: Path, tmp_path: Path) -> None:
    train_tokenizer([work / "corpus.jsonl"], tmp_path / "tokenizer", 320)
    faults = found(work, new(work), f"data.tokenizer={tmp_path / 'tokenizer'}").faults
    assert len(faults) == 1
    assert "was made with another tokenizer" in faults[0]
    length = "data.sequence_length=100000", "model.max_position_embeddings=100000"
    assert "tokens are not one sample of data.sequence_length = 100000" in found(work, new(work), *length).faults[0]


def test_epochs_of_each_source_are_those_that_training_reads(work: Path) -> None:
    blend = f"data.train=[{{path: {work}/data/train, weight: 3}}, {{path: {work}/data/validation, weight: 1}}]"
    here = found(work, new(work), blend, "train.train_iters=100")
    manifest = json.loads((work / "data" / "dataset.json").read_text())["splits"]
    for use, name, share in zip(here.sources, ("train", "validation"), (0.75, 0.25), strict=True):
        samples = (manifest[name]["tokens"] - 1) // 64
        assert (use.tokens, use.share) == (manifest[name]["tokens"], share)
        assert use.epochs == pytest.approx(100 * 8 * share / samples)
    (warning,) = here.warnings
    assert f"{work}/data/validation is read" in warning
    assert "epochs, 25% of the samples" in here.sources[1].line()


def test_a_resume_says_where_it_goes_on_and_what_was_changed(work: Path) -> None:
    here = found(work, "optimizer.lr=5e-4", "train.train_iters=9", "data.num_workers=1")
    assert here.start == f"continues {work}/run/iter_0000002 at step 2 of 9"
    assert here.changes == ["train.train_iters: 2 -> 9", "optimizer.lr: 0.001 -> 0.0005", "data.num_workers: 0 -> 1"]
    assert not here.faults
    done = found(work, "train.train_iters=2")
    assert done.changes == []
    assert "all of them are done" in done.warnings[0]
    refused = found(work, "train.seed=1", "model.num_layers=2", "data.sequence_length=32").faults
    assert len(refused) == 2
    assert "model.num_layers: 4 in the checkpoint, 2 in this run" in refused[0]
    assert "data.sequence_length: 64 in the checkpoint, 32 in this run" in refused[1]
    assert "train.seed: 1234 in the checkpoint, 1 in this run" in refused[1]


def test_other_data_in_the_same_place_is_found_before_a_resume(work: Path, tmp_path: Path) -> None:
    preprocess([work / "corpus.jsonl"], work / "tokenizer", tmp_path / "data", split=(0.7, 0.2, 0.1))
    (fault,) = found(work, f"data.train=[{{path: {tmp_path}/data/train}}]").faults
    assert "what stands there is not the data of the checkpoint" in fault


def test_a_second_stage_that_would_read_the_same_samples_again_is_told(work: Path, tmp_path: Path) -> None:
    start = f"checkpoint.initialize_from={work / 'run'}"
    (warning,) = found(work, new(work), start).warnings
    assert "train.seed = 1234" in warning
    assert "would read the same samples from the first on" in warning
    assert found(work, new(work), start, "train.seed=7").warnings == []
    convert(work / "run", tmp_path / "hf")
    start = f"checkpoint.initialize_from={tmp_path / 'hf'}"
    assert found(work, new(work), start, "train.seed=7").warnings == []
    (warning,) = found(work, new(work), start).warnings
    assert f"train.seed = 1234: the weights of {tmp_path}/hf come from a run with this data and seed" in warning
    start = f"checkpoint.initialize_from={work / 'run'}"
    preprocess([work / "corpus.jsonl"], work / "tokenizer", tmp_path / "data", split=(0.7, 0.2, 0.1))
    assert found(work, new(work), start, f"data.train=[{{path: {tmp_path}/data/train}}]").warnings == []


def test_weights_of_another_model_or_tokenizer_to_start_from(work: Path, tmp_path: Path) -> None:
    start = f"checkpoint.initialize_from={work / 'run'}"
    (fault,) = found(work, new(work), start, "model.ffn_hidden_size=96").faults
    assert "model.ffn_hidden_size: 64 in the checkpoint, 96 in this run" in fault
    train_tokenizer([work / "corpus.jsonl"], tmp_path / "tokenizer", 320)
    preprocess([work / "corpus.jsonl"], tmp_path / "tokenizer", tmp_path / "data", split=(0.8, 0.1, 0.1))
    data = f"data.tokenizer={tmp_path}/tokenizer", f"data.train=[{{path: {tmp_path}/data/train}}]"
    (warning,) = found(work, new(work), start, *data, "data.validation=[]").warnings
    assert "with which the weights of checkpoint.initialize_from were trained" in warning


def test_a_flipped_byte_of_the_data_is_found(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(work / "data", tmp_path / "data")
    data = f"data.train=[{{path: {tmp_path}/data/train}}]"
    assert "data            files have their sizes and checksums" in found(work, new(work), data).lines()
    content = bytearray((tmp_path / "data" / "train.bin").read_bytes())
    content[100] ^= 1
    (tmp_path / "data" / "train.bin").write_bytes(content)
    (fault,) = found(work, new(work), data).faults
    assert fault.startswith(f"data.train.0.path = {tmp_path}/data/train: {tmp_path}/data is damaged")
    assert "train.bin: the right size, but other content" in fault
    monkeypatch.setattr(data_files, "_READ_AT_ONCE", 1000)
    said = found(work, new(work), data)
    assert said.faults == []
    assert f"tools/verify_checkpoint.py {tmp_path}/data compares checksums" in said.sums


def test_room_for_checkpoints(work: Path) -> None:
    checkpoint = require_checkpoint(work / "run")
    run = load_run(work / "run.yaml")
    reader = TorchDistReader(checkpoint)
    real = sum(math.prod(reader.shape(key)) * reader.dtype(key).itemsize for key in reader.tensors)
    estimated = checkpoint_bytes(run)
    print(f"tensors of a checkpoint: estimated {estimated:,} bytes, {real:,} in the file")
    assert estimated == pytest.approx(real, rel=0.001)
    files = sum(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file())
    estimated = bytes_on_disk(run)
    print(f"files of a checkpoint: estimated {estimated:,} bytes, {files:,} on the disk")
    # What is left out are a few kilobytes of text, in so small a checkpoint 1 %.
    assert estimated == pytest.approx(files, rel=0.02)
    free = shutil.disk_usage(work).free
    many = free // estimated + 10
    copied = f"checkpoint.copy_to={work / 'copies'}"
    keep = found(work, new(work), copied, f"checkpoint.keep_last={many}", f"train.train_iters={4 * many}").warnings
    assert any(f"{many + 1:,} checkpoints of about" in warning for warning in keep)
    assert any("copies" in warning and f": {many + 1:,} copies of about" in warning for warning in keep)
    keep = found(work, new(work), "checkpoint.keep_last=1", f"train.train_iters={4 * many}").warnings
    assert not any("checkpoints of about" in warning for warning in keep)
    huge = replace(run, model=replace(run.model, hidden_size=2**26, ffn_hidden_size=2**26))
    huge = replace(huge, checkpoint=replace(run.checkpoint, directory=str(work / "another")))
    (fault,) = examine(values_of(huge), huge, open_hugging_face).faults
    assert "a checkpoint takes about" in fault
    assert "free there" in fault


def test_a_run_says_what_it_is_before_its_first_step(work: Path) -> None:
    said = [line.split(" ", 1)[1] for line in (work / "said").read_text().splitlines() if " " in line]
    begin = next(number for number, line in enumerate(said) if line.startswith("model "))
    names = [line.split(" ")[0] for line in said[begin : begin + 7]]
    assert names == ["model", "length", "layout", "data", "start", "checkpoints", "metrics"]
    assert said[begin + 7].startswith("step 1/2 | ")
    assert said[begin + 3].endswith("/data/train: 23,490 tokens, 0.0436 epochs")
    assert "left" not in next(line for line in said if line.startswith("step 2/2"))


def test_the_whole_of_a_check(work: Path) -> None:
    text = check(work)
    assert "start           continues" in text
    assert "changed         train.train_iters: 2 -> 6" in text
    config: Any = read_yaml(work / "run.yaml")
    assert config["train"]["train_iters"] == 6
    alone = check(work, "data.tokenizer=gone", files=False)
    assert "start  " not in alone


def test_a_check_of_stages_shows_their_rates_and_what_does_not_fit(work: Path, tmp_path: Path) -> None:
    mapping = run_mapping(work)
    sources = {"main": {"path": f"{work}/data/train"}}
    stages = [{"name": "first", "mix": {"main": 1}, "steps": 4}, {"name": "last", "mix": {"main": 1}, "steps": 2}]
    stages[1] |= {"sequence_length": 32, "lr_scale": 0.5}
    kept = {key: mapping["data"][key] for key in ("sequence_length", "tokenizer")}
    mapping["data"] = {**kept, "sources": sources, "stages": stages}
    mapping["train"] = {"global_batch_size": 8}
    mapping["schedule"] = {"kind": "wsd", "warmup_iters": 2, "decay": {"stage": "last"}, "decay_style": "linear"}
    mapping["checkpoint"]["directory"] = str(tmp_path / "run")
    path = str(write_run(tmp_path / "run.yaml", mapping))
    how: Any = {"files": True, "open_foreign": open_hugging_face}
    text = check_run(path, [], None, **how)
    assert re.search(r"first +4 steps +2.05K tokens  8 x 64  lr 0.0005 to 0.001", text)
    assert re.search(r"last +2 steps +512 tokens  8 x 32  lr 0.00025 to 0", text)
    assert re.search(r"in all +6 steps +2.56K tokens", text)
    longer = ["schedule.warmup_tokens=3000", "schedule.warmup_iters=0"]
    with pytest.raises(ConfigError, match=r"schedule\.warmup_tokens = 3000: the warmup is longer than the 2560 tokens"):
        check_run(path, longer, None, **how)
    no_stages, no_length = {**mapping["data"], "stages": []}, {**stages[0]}
    del no_length["steps"]
    for data, fault in (
        (no_stages, "data.train: is required, or data.sources with data.stages"),
        ({**mapping["data"], "stages": [no_length, stages[1]]}, "data.stages.0.tokens: exactly one of tokens, steps"),
    ):
        with pytest.raises(ConfigError, match=re.escape(fault)):
            check_run(str(write_run(tmp_path / "run.yaml", mapping | {"data": data})), [], None, **how)


def test_validation_data_that_are_read_over_and_over_are_said(work: Path) -> None:
    often = ["train.eval_interval=2", "train.eval_iters=1000"]
    assert re.search(r"data\.validation\.0\.path = .* and validation reads 8,000 such samples", check(work, *often))
    assert "such samples" not in check(work, *often[:1], "train.eval_iters=1")


def test_validation_on_what_is_trained_on_is_said(work: Path, tmp_path: Path) -> None:
    """By its path, and of a copy elsewhere; where it is read at all."""
    evaluates, path = "train.eval_interval=2", f"data.validation.0.path={work}/data/train"
    said = r"data\.validation\.0\.path = .*/train is trained on, as data\.train\.0: its loss says"
    assert re.search(said, check(work, evaluates, path))
    shutil.copytree(work / "data", tmp_path / "copy")
    copied = f"data.validation.0.path={tmp_path}/copy/train"
    assert re.search(said, check(work, evaluates, copied))
    assert "is trained on" not in check(work, evaluates) + check(work, path)
    mapping = run_mapping(work)
    mapping["train"]["eval_interval"], mapping["data"]["validation"] = 2, [{"path": f"{tmp_path}/copy/train"}]
    run = load_config(RunConfig, mapping, source="run.yaml")
    assert [line for line in show_plan(run, "run.yaml") if re.search(f"warning: {said}", line)]
