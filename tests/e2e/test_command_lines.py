"""Every command line says what it does, reads its example, and answers bad input with one message and exit code 2."""

import importlib
import os
import re
from pathlib import Path

import pytest

from megatron_ext.config import dump_yaml, load_config, load_run, read_yaml
from tests.support.commands import TOOLS, command, new_process
from tests.support.workspace import ROOT, run_mapping, write_run

TOOL_NAMES = sorted(path.stem for path in TOOLS.glob("*.py") if path.stem != "__init__")
EXAMPLE = ROOT / "examples" / "quickstart"
RUNS = [path for path in sorted(ROOT.glob("examples/*/*.yaml")) if "model" in read_yaml(path)]
OPTIONS = [path for path in sorted(ROOT.glob("examples/*/*.yaml")) if path not in RUNS]


def assert_clear_error(process: object, *parts: str) -> None:
    stderr: str = process.stderr  # type: ignore[attr-defined]
    assert process.returncode == 2, stderr  # type: ignore[attr-defined]
    assert "Traceback" not in stderr
    assert stderr.count("error: ") == 1
    for part in parts:
        assert part in stderr


_HELP_AND_IMPORTS = """
import runpy, sys
sys.argv = sys.argv[1:] + ["--help"]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    heavy = "torch megatron transformers tokenizers sentencepiece safetensors numpy wandb rich".split()
    print([name for name in heavy if name in sys.modules], file=sys.stderr)
"""


@pytest.mark.parametrize("tool", TOOL_NAMES)
def test_help_teaches_at_once(tool: str) -> None:
    process = new_process("-c", _HELP_AND_IMPORTS, TOOLS / f"{tool}.py")
    assert process.returncode == 0
    assert f"python tools/{tool}.py" in process.stdout, "no example of use"
    assert process.stderr == "[]\n", "help waits for what it does not need"
    for internal in ("Annotated", "DataSource", "NoneType", "typing."):
        assert internal not in process.stdout


def test_help_has_the_keys_of_the_entries_of_a_list() -> None:
    text = command(TOOLS / "train.py", "--help").stdout
    assert "data.train  (list of mappings, default [])" in text
    assert "data.train.N.weight  (number, default 1.0)" in text
    assert "data.sources.ID.max_epochs  (number, default 4.0)" in text
    assert "model.moe_layer_freq  (integer | list of 0 | 1, default 1)" in text


EXPLAINED_ELSEWHERE = ("train", "prove", "plan", "tokenizer", "inspect_data", "launch", "preflight", "evaluate")
"""Tools whose options are keys of a run, or belong to commands of theirs."""


@pytest.mark.parametrize(
    "tool",
    [name for name in TOOL_NAMES if name not in EXPLAINED_ELSEWHERE],
)
def test_every_option_is_explained(tool: str) -> None:
    text = command(TOOLS / f"{tool}.py", "--help").stdout
    module = importlib.import_module(f"tools.{tool}")
    (options,) = (value for name, value in vars(module).items() if name.endswith("Options"))
    flat = " ".join(text.split())
    for name, info in options.__pydantic_fields__.items():
        assert f"--{name.replace('_', '-')}" in text or name.upper() in text
        assert info.description, f"{tool}: {name} has no docstring"
        assert " ".join(info.description.split()[:4]) in flat


@pytest.mark.parametrize("path", OPTIONS, ids=lambda path: path.stem)
def test_example_options_are_those_of_their_tool(path: Path) -> None:
    module = importlib.import_module(f"tools.{path.stem}")
    cls = module.TrainOptions if path.stem == "tokenizer" else getattr(module, f"{path.stem.capitalize()}Options")
    load_config(cls, read_yaml(path), source=str(path))


@pytest.mark.parametrize("path", RUNS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_example_runs_are_valid(path: Path, tmp_path: Path) -> None:
    process = command(TOOLS / "train.py", path, "--check", "--config-only")
    assert process.returncode == 0, process.stderr
    assert "rank grid" in process.stdout


def test_check_shows_the_run_and_starts_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    process = command(
        TOOLS / "train.py", EXAMPLE / "moe.yaml", "train.seed=7", "--check", "--config-only", "--world-size", "8"
    )
    assert process.returncode == 0, process.stderr
    assert not list(tmp_path.iterdir())
    resolved, _, rest = process.stdout.partition("\nrank grid")
    (tmp_path / "resolved.yaml").write_text(resolved)
    assert load_run(tmp_path / "resolved.yaml") == load_run(EXAMPLE / "moe.yaml", ["train.seed=7"])
    assert "TP 2 x CP 1 x DP 2 x PP 2, experts ETP 1 x EP 2 x EDP 2" in rest
    assert re.search(r"parameters +7,607,424 in all, 4,068,480 active", rest)
    assert "state memory" in rest
    assert "Hugging Face    MegatronExtForCausalLM (transformers has no such model; the nearest is " in rest


def test_all_faults_of_a_run_come_in_one_message(tmp_path: Path) -> None:
    mapping = run_mapping(tmp_path, moe=True)
    mapping["model"]["num_layers"] = "four"
    mapping["trian"] = mapping.pop("train")
    mapping["parallel"] = {"tensor_model_parallel_size": 2, "sequence_parallel": True, "expert_tensor_parallel_size": 1}
    process = command(TOOLS / "train.py", write_run(tmp_path / "run.yaml", mapping), "--check", "--config-only")
    assert_clear_error(
        process,
        "4 problems",
        "unknown key; did you mean 'train'?",
        "train: is required",
        "model.num_layers = 'four': must be an integer",
        "parallel.expert_tensor_parallel_size = 1",
    )


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["train.py", "nowhere.yaml"], ["HERE/nowhere.yaml: No such file"]),
        (
            [
                "train.py",
                str(EXAMPLE / "moe.yaml"),
                "--check",
                "--config-only",
                "model.transformer_overrides={window_size: [3, 0]}",
            ],
            ["model.transformer_overrides.window_size: windows and sinks are those of model.sliding_window"],
        ),
        (["prove.py", "nowhere.yaml"], ["HERE/nowhere.yaml: No such file"]),
        (["corpus.py"], ["output: is required"]),
        (["preprocess.py", "nowhere.jsonl", "--tokenizer", "t", "--output", "o"], ["HERE/nowhere.jsonl: "]),
        (["tokenizer.py", "train", "nowhere.jsonl", "--output", "o"], ["HERE/nowhere.jsonl: "]),
        (["tokenizer.py", "trian", "c.jsonl"], ["tools/tokenizer.py trian: no such command; did you mean train?"]),
        (
            ["upcycle.py", "nowhere", "target", "--num-experts", "4"],
            ["HERE/nowhere: no such directory"],
        ),
        (["upcycle.py", "nowhere", "target", "--num-experts", "four"], ["num_experts = 'four': must be an integer"]),
        (
            ["upcycle.py", "nowhere", "target", "--num-experts", "4", "--ratio", "0.5"],
            ["--ratio: is an option of --method"],
        ),
        (
            ["average.py", "nowhere", "elsewhere", "target"],
            ["HERE/nowhere: no such directory"],
        ),
        (["convert.py", "nowhere", "target"], ["HERE/nowhere: no such directory"]),
        (["verify.py", "nowhere", "target"], ["HERE/nowhere: "]),
        (["generate.py", "nowhere", "--prompts", "a"], ["HERE/nowhere: no such directory"]),
        (["report.py", "--metrics", "a=nowhere.jsonl", "--output", "r.html"], ["HERE/nowhere.jsonl: "]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_bad_input_is_one_error(
    arguments: list[str], parts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    expected = [part.replace("HERE", str(tmp_path)) for part in parts]
    assert_clear_error(command(TOOLS / arguments[0], *arguments[1:]), *expected)
    assert not list(tmp_path.iterdir()), "something was left behind"


def test_a_fault_that_meets_every_rank_is_said_once(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run.yaml", run_mapping(tmp_path))
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3")
    process = new_process(*launcher, TOOLS / "train.py", run, "train.global_batch_size=6", "train.micro_batch_size=1")
    assert process.returncode != 0
    assert process.stderr.count("no tokenizer here") == 1


def test_a_tool_says_when_its_package_is_of_another_checkout(tmp_path: Path) -> None:
    for name in ("tools/corpus.py", "megatron_ext/__init__.py"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text((ROOT / name).read_text())
    foreign = new_process(tmp_path / "tools" / "corpus.py", PYTHONPATH=str(ROOT)).stderr
    note, *_ = foreign.splitlines()
    assert note == (
        f"note: {tmp_path}/tools/corpus.py runs with the package {ROOT}/megatron_ext, not with that of {tmp_path}"
    )
    own = new_process(TOOLS / "corpus.py", PYTHONPATH=str(ROOT)).stderr
    other_rank = new_process(tmp_path / "tools" / "corpus.py", PYTHONPATH=str(ROOT), RANK="1").stderr
    assert foreign.partition("\n")[2] == own == other_rank


def test_options_of_a_file_and_of_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "corpus.yaml").write_text(dump_yaml({"output": str(tmp_path / "a.jsonl"), "outptu": 1}))
    assert_clear_error(
        command(TOOLS / "corpus.py", "--config", tmp_path / "corpus.yaml"),
        "outptu = 1: unknown key; did you mean 'output'?",
    )


def test_doctor_says_what_is_here_and_that_training_can_run() -> None:
    process = command(TOOLS / "doctor.py")
    assert process.returncode == 0, process.stderr
    for part in ("Machine\n", "Installed\n", "Backend torch\n", "Known faults of megatron-core", "training can run"):
        assert part in process.stdout
    brief = command(TOOLS / "doctor.py", "--brief").stdout
    assert "Known faults" not in brief


def test_doctor_ends_with_2_where_training_cannot_run(tmp_path: Path) -> None:
    (tmp_path / "megatron_core-0.20.0.dist-info").mkdir()
    (tmp_path / "megatron_core-0.20.0.dist-info" / "METADATA").write_text("Name: megatron-core\nVersion: 0.20.0\n")
    path = f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    process = new_process(TOOLS / "doctor.py", PYTHONPATH=path)
    assert_clear_error(process, "megatron-core 0.20.0 is installed", "< 0.20")
    assert "megatron-core       0.20.0" in process.stdout
    assert "training can run here" not in process.stdout
