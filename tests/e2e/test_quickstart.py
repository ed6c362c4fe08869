"""The main job as a user runs it: text to a verified Hugging Face MoE; interrupted, it goes on with what is missing."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from statistics import mean

import psutil
import pytest

from examples.quickstart import measure
from megatron_ext.monitoring.metrics_file import read_metrics
from tests.support.commands import train
from tests.support.workspace import ROOT, reported_losses

MOST_BYTES = 6 * 2**30


def proportional_memory(process: psutil.Process) -> int:
    """Memory of `process` and all below it; pages that several share are counted once."""
    total, members = 0, [process]
    with contextlib.suppress(psutil.Error):  # it has just ended
        members += process.children(recursive=True)
    for member in members:
        with contextlib.suppress(psutil.Error):
            total += member.memory_full_info().pss
    return total


def quickstart(directory: Path, share: int = 100) -> tuple[str, int]:
    """Run it in `directory` with a share of its steps; return what it printed and the most memory it used."""
    process = subprocess.Popen(
        [ROOT / "examples" / "quickstart" / "run.sh"],
        cwd=directory,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHON": sys.executable, "QUICKSTART_SHARE": str(share)},
    )
    peak, all_of_it = 0, psutil.Process(process.pid)

    def watch() -> None:
        nonlocal peak
        while process.poll() is None:
            peak = max(peak, proportional_memory(all_of_it))
            time.sleep(1)

    watcher = threading.Thread(target=watch)
    watcher.start()
    output, _ = process.communicate(timeout=1200)
    watcher.join()
    assert process.returncode == 0, output
    return output, peak


def validation_losses(directory: Path) -> list[float]:
    return [r["validation_loss"] for r in read_metrics(directory / "metrics.jsonl") if "validation_loss" in r]


@pytest.fixture(scope="module")
def share(request: pytest.FixtureRequest) -> int:
    """Percent of its steps: what it trains on the slowest machines, and all with --product."""
    return 100 if request.config.getoption("--product") else 25


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, share: int) -> tuple[Path, str, int]:
    directory = tmp_path_factory.mktemp("quickstart")
    output, peak = quickstart(directory, share)
    return directory / "build" / "quickstart", output, peak


def test_it_ends_with_a_summary_and_stays_within_its_memory(done: tuple[Path, str, int]) -> None:
    out, output, peak = done
    print(output)
    print(f"most memory used: {peak / 2**30:.2f} GiB")
    assert peak < MOST_BYTES
    assert "tokens/s" in output
    assert "build/quickstart/report.html" in output
    assert (out / "report.html").stat().st_size > 80_000


def test_both_phases_learn_and_the_second_goes_on_from_the_first(done: tuple[Path, str, int], share: int) -> None:
    out, _, _ = done
    dense, moe = reported_losses(out / "dense"), reported_losses(out / "moe")
    assert (len(dense), len(moe)) == (200 * share // 100, 80 * share // 100)
    print(f"loss {dense[0]:.2f} to {dense[-1]:.2f}, {moe[0]:.2f} to {moe[-1]:.2f}")
    assert dense[-1] < dense[0] - (3 if share == 100 else 1.5)
    # The upcycled model starts where the dense one ended (single steps differ by more: their texts do).
    assert abs(moe[0] - mean(dense[-5:])) < 1
    world_sizes = [
        json.loads(line)["world_size"]
        for line in (out / "moe" / "metrics.jsonl").read_text().splitlines()
        if "world_size" in line
    ]
    assert world_sizes[-1] == 4
    before, after = (validation_losses(out / phase)[-1] for phase in ("dense", "moe"))
    print(f"validation loss {before:.3f} after the dense phase, {after:.3f} after the MoE phase")
    assert after < before


def test_two_stages_are_read_and_each_source_has_its_losses(done: tuple[Path, str, int], share: int) -> None:
    out, _, _ = done
    steps = [r for r in read_metrics(out / "dense" / "metrics.jsonl") if "loss" in r]
    stages = [step["stage"] for step in steps]
    assert stages == ["broad"] * (160 * share // 100) + ["anneal"] * (40 * share // 100)
    shares = [sum(s["supervised_tokens"] for s in step["sources"].values()) for step in steps]
    assert [step["supervised_tokens"] for step in steps] == shares
    last = steps[-1]
    assert sum(s["consumed_tokens"] for s in last["sources"].values()) == len(steps) * 16 * 256
    validation = [r for r in read_metrics(out / "dense" / "metrics.jsonl") if "validation_loss" in r]
    assert len(validation[-1]["sources"]) == len(last["sources"]) > 1
    print(f"last step: {last['sources']}; validation: {validation[-1]}")


def test_the_other_layout_trains_what_the_first_would_have(
    done: tuple[Path, str, int], share: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the checkpoint in the middle, the layout of the first half repeats the first losses of the second half."""
    out, _, _ = done
    same = out / "same layout"
    half = 40 * share // 100
    checkpoint = f"iter_{half:07d}"
    shutil.copytree(out / "moe" / checkpoint, same / checkpoint)
    (start, *_) = (json.loads(line) for line in (out / "moe" / "metrics.jsonl").read_text().splitlines())
    run = same / checkpoint / "run.yaml"
    monkeypatch.chdir(out.parents[1])
    again = train(start["world_size"], run, f"checkpoint.directory={same}", f"train.stop_at_iteration={half + 3}")
    assert again.returncode == 0, again.stderr
    measured, expected = reported_losses(out / "moe")[half : half + 3], reported_losses(same)
    difference = max(abs(a - b) / b for a, b in zip(measured, expected, strict=True))
    print(f"largest relative difference of the loss after the change of layout: {difference:.1e}")
    # fp32 rounding; see the parity grid.
    assert difference < 1e-5


def test_the_exported_model_is_the_trained_one(done: tuple[Path, str, int]) -> None:
    out, _, _ = done
    upcycling = json.loads((out / "upcycling.json").read_text())["upcycling"]
    figures = json.loads((out / "verification.json").read_text())
    print(f"upcycling: {upcycling}\nverification: {figures}")
    assert upcycling["max_abs_difference"] < 1e-5 * upcycling["scale"]
    assert figures["weights"]["different"] == []
    assert figures["logits"]["max_abs_difference"] < 1e-5 * figures["logits"]["scale"]
    assert figures["logits"]["argmax_agreement"] > 0.999
    generated = json.loads((out / "generated.json").read_text())
    assert all(row["continuation"] for row in generated)


def test_started_again_it_does_only_what_is_missing(done: tuple[Path, str, int]) -> None:
    out, _, _ = done
    shutil.rmtree(out / "hf")
    (out / "report.html").unlink()
    output, _ = quickstart(out.parents[1])
    lines = [line.removeprefix("== ") for line in output.splitlines() if line.startswith("== ")]
    repeated = [line for line in lines if "done before" not in line]
    assert repeated == ["export", "report"]
    assert (out / "hf" / "config.json").is_file()
    assert (out / "report.html").is_file()


@pytest.mark.parametrize(("slowness", "share"), [(0.5, 100), (1.7, 100), (1.8, 75), (2.4, 50), (3.0, 25), (50.0, 25)])
def test_a_slow_machine_trains_fewer_steps(slowness: float, share: int) -> None:
    assert measure.share_of_steps(slowness * measure.STEP_SECONDS) == share


@pytest.mark.parametrize(
    ("share", "elapsed", "moe_share"), [(100, 105, 100), (100, 200, 50), (100, 240, 25), (50, 150, 50), (25, 600, 25)]
)
def test_a_machine_that_became_slow_trains_fewer_steps_of_the_moe(share: int, elapsed: int, moe_share: int) -> None:
    done = subprocess.run(
        [sys.executable, measure.__file__, str(share), str(elapsed)], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) == moe_share
    assert ("slower than it was" in done.stderr) == (moe_share < share)


def test_the_machine_is_measured() -> None:
    done = subprocess.run([sys.executable, measure.__file__], capture_output=True, text=True, check=True)
    share = int(done.stdout)
    assert share in measure.SHARES
    assert (f"{share} % of the steps" in done.stderr) == (share < 100)


def test_another_corpus_does_not_mix_with_finished_steps(done: tuple[Path, str, int], tmp_path: Path) -> None:
    out, _, _ = done
    (tmp_path / "text.txt").write_text("some text")
    process = subprocess.run(
        [ROOT / "examples" / "quickstart" / "run.sh"],
        cwd=out.parents[1],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHON": sys.executable, "CORPUS": str(tmp_path / "text.txt")},
    )
    assert process.returncode == 2
    assert "holds results for another corpus" in process.stderr
