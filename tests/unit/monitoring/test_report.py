"""The report: one file that needs nothing else, with everything on it."""

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import matplotlib.image
import pytest

from megatron_ext.errors import DataError
from megatron_ext.monitoring.metrics_file import MetricsFile
from megatron_ext.monitoring.report import figure_lines, read_phases, summary_rows, write_report

LOADS = {"1": [0.5, 0.25, 0.25], "2": [0.4, 0.3, 0.3]}
HEALTH = {"max_violation": 0.5, "dead_experts": 0, "entropy": 0.9, "top1": 0.4, "max1_max2": 1.5, "drop_rate": 0.0}


def write_metrics(path: Path, steps: int, *, loss: float, experts: bool = False) -> str:
    file = MetricsFile(path)
    file.write({"event": "start", "iteration": 0})
    for step in range(1, steps + 1):
        record: dict[str, object] = {
            "iteration": step,
            "loss": loss - step / 10,
            "learning_rate": 1e-3,
            "consumed_tokens": step * 1000,
            "tokens_per_second": 500.0 + step,
            "tflops_per_device": 0.25,
        }
        if experts:
            record["moe"] = {layer: {**HEALTH, "load": load} for layer, load in LOADS.items()}
        file.write(record)
    file.write({"iteration": steps, "validation_loss": loss})
    file.close()
    return str(path)


class Page(HTMLParser):
    """Collects what a page refers to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.references: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.references += [value or "" for name, value in attributes if name in ("src", "href")]


@pytest.fixture
def named(tmp_path: Path) -> list[str]:
    dense = write_metrics(tmp_path / "dense.jsonl", 10, loss=9.0)
    moe = write_metrics(tmp_path / "moe.jsonl", 5, loss=4.0, experts=True)
    return [f"dense={dense}", f"MoE={moe}"]


def test_summary(named: list[str]) -> None:
    rows = summary_rows(read_phases(named))
    assert rows[0] == ("dense", "10", "10,000", "8.900", "8.000", "9.000", "506", "0.25")
    assert rows[1][:4] == ("MoE", "5", "5,000", "3.900")


def test_page_is_self_contained_and_complete(named: list[str], tmp_path: Path) -> None:
    (tmp_path / "figures.json").write_text(json.dumps({"logits": {"max_abs_difference": 5.7e-6, "tokens": 1024}}))
    generated = [{"prompt": "a < b", "continuation": " & so <script>on</script>"}]
    (tmp_path / "generated.json").write_text(json.dumps(generated))
    phases = read_phases(named)
    write_report(
        tmp_path / "out" / "report.html", "A & B", phases, [tmp_path / "figures.json"], tmp_path / "generated.json"
    )
    text = (tmp_path / "out" / "report.html").read_text()
    page = Page(text)
    assert page.tags.count("img") == 3, "curves, and load and health of experts for the MoE phase only"
    assert all(reference.startswith("data:image/png;base64,") for reference in page.references)
    for reference in page.references:
        picture = matplotlib.image.imread(io.BytesIO(base64.b64decode(reference.partition(",")[2])))
        assert picture.shape[0] > 200
        assert picture.std() > 0, "an empty picture"
    assert "script" not in page.tags
    assert "A &amp; B" in text
    assert "a &lt; b" in text
    assert "5.7e-06" in text
    assert re.search(r"Experts, MoE", text)
    assert not list((tmp_path / "out").glob("*.partial"))


def test_figures_on_the_terminal(tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    path.write_text(json.dumps({"weights": {"tensors": 95, "different": [], "largest_difference": 0.0}}))
    assert figure_lines([path]) == ["weights: tensors 95, different none, largest difference 0"]


@pytest.mark.parametrize(
    ("metrics", "figures", "generated", "complaint"),
    [
        ("dense", None, None, "expected name=metrics.jsonl"),
        ("dense=empty.jsonl", None, None, "holds no training step"),
        (None, "[1]", None, "expected a JSON object"),
        (None, '{"a": 1}', None, "not written by --figures"),
        (None, None, '{"a": 1}', "not written by --output of tools/generate.py"),
    ],
)
def test_files_of_another_kind_are_named(
    metrics: str | None,
    figures: str | None,
    generated: str | None,
    complaint: str,
    named: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "figures").write_text(figures or "{}")
    (tmp_path / "generated").write_text(generated or "[]")
    with pytest.raises(DataError, match=complaint):
        write_report("r.html", "x", read_phases([metrics] if metrics else named), ["figures"], "generated")
    assert not (tmp_path / "r.html").exists()


def test_a_validation_that_is_no_number_is_shown(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "m.jsonl")
    values = {"learning_rate": 1e-3, "consumed_tokens": 5, "tokens_per_second": 5.0, "tflops_per_device": 0.1}
    file.write({"iteration": 1, "loss": 3.0, **values})
    file.write({"iteration": 1, "validation_loss": float("nan")})
    file.close()
    phases = read_phases([f"a={tmp_path / 'm.jsonl'}"])
    assert summary_rows(phases)[0][5] == "nan"
    write_report(tmp_path / "r.html", "x", phases, [], None)
