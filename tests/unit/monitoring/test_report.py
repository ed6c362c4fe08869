"""The report: one file that needs nothing else, with everything on it, which a browser draws without a complaint."""

import base64
import json
import re
import threading
import urllib.error
import urllib.request
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from megatron_ext.errors import ConfigError, DataError
from megatron_ext.monitoring.metrics_file import MetricsFile
from megatron_ext.monitoring.report import figure_lines, read_phases, run_file, summary_rows, write_report
from megatron_ext.monitoring.report.evaluations import evaluation_table, sample_table
from megatron_ext.monitoring.report.page import report_page
from megatron_ext.monitoring.report.phases import RunFiles
from megatron_ext.monitoring.report.plots import MOST_POINTS, plot_data, thin
from megatron_ext.monitoring.report.serve import ReportServer
from megatron_ext.monitoring.report.sources import mean_loss, source_rows
from tests.unit.monitoring.reported_runs import write_metrics


class Page(HTMLParser):
    """Collects what a page refers to, and the numbers in it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.references: list[str] = []
        self.data: dict[str, Any] = {}
        self._in_data = False
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.references += [value or "" for name, value in attributes if name in ("src", "href")]
        self._in_data = ("id", "data") in attributes

    def handle_data(self, data: str) -> None:
        if self._in_data and data.strip():
            self.data = json.loads(data)


def test_summary(named: list[str]) -> None:
    rows = summary_rows(read_phases(named))
    assert rows[0] == ("dense", "10", "10,000", "8.900", "8.000", "9.000", "506", "250 GFLOP/s")
    assert rows[1][:4] == ("MoE", "5", "5,000", "3.900")


def test_a_run_may_be_given_by_its_folder(tmp_path: Path) -> None:
    for folder in ("dense", "lr=1e-3"):
        (tmp_path / folder).mkdir()
        write_metrics(tmp_path / folder / "metrics.jsonl", 2, loss=9.0)
    entries = [f"{tmp_path}/dense", f"again={tmp_path}/dense", f"{tmp_path}/lr=1e-3/metrics.jsonl"]
    assert [phase.name for phase in read_phases(entries)] == ["dense", "again", "lr=1e-3"]
    with pytest.raises(DataError, match=r"two runs are called 'dense'; name them, as in first="):
        read_phases([f"{tmp_path}/dense", f"{tmp_path}/dense/metrics.jsonl"])
    with pytest.raises(DataError, match=r"nothing/metrics: No such file"):
        read_phases([f"{tmp_path}/nothing/metrics"])


def test_page_is_self_contained_and_complete(named: list[str], tmp_path: Path) -> None:
    (tmp_path / "figures.json").write_text(json.dumps({"logits": {"max_abs_difference": 5.7e-6, "tokens": 1024}}))
    generated = [{"prompt": "a < b", "continuation": " & so <script>on</script>"}]
    named = [entry.replace("dense=", "</script>dense=") for entry in named]
    (tmp_path / "generated.json").write_text(json.dumps(generated))
    phases = read_phases(named)
    write_report(
        tmp_path / "out" / "report.html", "A & B", phases, [tmp_path / "figures.json"], tmp_path / "generated.json"
    )
    text = (tmp_path / "out" / "report.html").read_text()
    page = Page(text)
    assert page.references == [], "everything is inside"
    dense, moe = page.data["phases"]
    assert dense["curves"]["loss"] == pytest.approx([9.0 - step / 10 for step in range(1, 11)])
    assert dense["curves"]["grad_norm"][3] == 0.25
    assert dense["curves"]["memory_bytes"] == [2.0] * 10
    assert dense["hours"][9] == pytest.approx(0.09)
    assert dense["validation"] == {"step": [10], "loss": [9.0]}
    assert "mfu" not in dense["curves"], "what was not recorded is not drawn"
    assert "experts" not in dense
    assert list(base64.b64decode(moe["experts"]["load"]["1"]))[:3] == [96, 48, 48], "in 64ths of an even share"
    assert set(moe["experts"]["health"]) == {"max_violation", "entropy", "top1", "max1_max2"}
    assert "Zero in every layer at every step: experts without a token; share of dropped tokens." in text
    assert "processes 4, TP 2" in text
    assert "seed: 7" in text
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
        ("dense", None, None, "dense: No such file"),
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


@pytest.mark.parametrize("value", ["1e308", "-1e308"])
def test_numbers_that_nothing_can_draw_are_left_out(value: str, tmp_path: Path) -> None:
    path = Path(write_metrics(tmp_path / "m.jsonl", 3, loss=9.0, experts=True))
    text = path.read_text().replace("501.0", value).replace("0.25", value)
    assert value in text
    path.write_text(text.replace('"load": [', '"load": 3, "before": [', 1))
    write_report(tmp_path / "r.html", "x", read_phases([f"a={path}"]), [], None)


def test_a_continued_run_is_one_curve_with_a_mark(tmp_path: Path) -> None:
    path = write_metrics(tmp_path / "m.jsonl", 6, loss=5.0)
    file = MetricsFile(Path(path))
    file.write({"event": "start", "iteration": 4, "world_size": 2})
    for step in (5, 6, 7):
        values = {"learning_rate": 1e-3, "consumed_tokens": step * 1000, "tokens_per_second": 5.0}
        file.write({"iteration": step, "loss": 3.0, "tflops_per_device": 0.1, **values})
    file.close()
    (phase,) = read_phases([f"a={path}"])
    data = plot_data([phase])["phases"][0]
    assert data["step"] == [1, 2, 3, 4, 5, 6, 7]
    assert data["restarts"] == [4]
    assert data["curves"]["loss"][3:] == pytest.approx([4.6, 3.0, 3.0, 3.0])


def test_sources_have_their_curves_and_a_row_each(named: list[str], tmp_path: Path) -> None:
    phases = read_phases(named)
    dense, moe = plot_data(phases)["phases"]
    assert "sources" not in dense
    sources = moe["sources"]
    assert sources["loss"] == {
        "en": pytest.approx([3.9, 3.8, 3.7, 3.6, 3.5]),
        "ja": [None, pytest.approx(3.0), None, pytest.approx(1.0), None],
    }
    assert sources["validation"] == {"en": [3.5], "ja": [4.5]}
    assert (sources["stages"], sources["epochs"]["en"][-1]) == ([3], 0.5)
    assert source_rows(phases[1]) == [
        ("en", "4,500", "0.500", "3.500", "3.500", "3.500", "33.12"),
        ("ja", "3,600", "0.400", "1.000", "4.500", "4.500", "90.02"),
    ]
    write_report(tmp_path / "r.html", "x", phases, [], None)
    text = (tmp_path / "r.html").read_text()
    assert "Sources, MoE" in text
    assert "Stages: first, second." in text


def test_a_rare_source_counts_by_its_tokens_where_steps_are_drawn_as_one() -> None:
    source = {"loss": 4.0, "supervised_tokens": 30.0}
    steps = [{"sources": {"ja": {**source, "loss": loss}}} for loss in (4.0, None)]
    steps += [{"sources": {}}, {"sources": {"ja": {"loss": 1.0, "supervised_tokens": 10.0}}}, {}]
    assert mean_loss(steps, "ja") == pytest.approx((4.0 * 30 + 1.0 * 10) / 40)
    assert mean_loss(steps, "en") is None


def test_what_is_no_source_is_left_out(tmp_path: Path) -> None:
    path = write_metrics(tmp_path / "m.jsonl", 2, loss=9.0)
    text = (tmp_path / "m.jsonl").read_text()
    (tmp_path / "m.jsonl").write_text(
        text.replace('"loss": 8.9', '"sources": {"a": 7, "b": {"loss": []}}, "loss": 8.9')
    )
    (phase,) = read_phases([f"a={path}"])
    assert [step["sources"] for step in phase.steps] == [{}, {}]


def test_a_long_run_keeps_its_spikes_in_few_points() -> None:
    records = [{"iteration": step, "loss": 3.0} for step in range(100_000)]
    records[54_321]["loss"], records[77_777]["loss"] = 9.0, float("nan")
    records[33_333]["grad_norm"] = 70.0
    kept = thin(records, MOST_POINTS, "loss", "grad_norm")
    assert len(kept) <= MOST_POINTS
    assert {0, 33_333, 54_321, 77_777, 99_999} <= {record["iteration"] for record in kept}
    assert [record["iteration"] for record in kept] == sorted(record["iteration"] for record in kept)


def test_events_and_the_parts_of_a_step_are_drawn(named: list[str], tmp_path: Path) -> None:
    dense, moe = plot_data(read_phases(named))["phases"]
    assert dense["events"]["step"] == []
    assert moe["events"]["step"] == [3, 5]
    assert moe["events"]["severity"] == ["warning", "error"]
    assert moe["seconds"] == {"data": [0.25] * 5, "forward_backward": [1.0] * 5}
    assert moe["curves"]["checkpoint_lag"] == [2] * 5
    write_report(tmp_path / "r.html", "x", read_phases(named), [], None)
    assert "<td>5</td><td>failed</td><td>out of memory</td>" in (tmp_path / "r.html").read_text()


def test_a_file_is_followed_also_where_it_is_written_anew(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    files = RunFiles([f"a={write_metrics(path, 3, loss=9.0)}"])
    assert files.update()
    assert not files.update()
    with open(path, "a") as file:
        file.write('{"iteration": 4, "loss": 8.5, "consumed_tokens": 4000, ')
        file.flush()
        assert files.update()
        assert len(files.phases()[0].steps) == 3
        file.write('"tokens_per_second": 5.0, "tflops_per_device": 0.1}\n')
    assert files.update()
    assert [step["iteration"] for step in files.phases()[0].steps] == [1, 2, 3, 4]
    # The run was killed and goes on from step 2: the file is cut and moved into place.
    MetricsFile(path, 2).close()
    assert files.update()
    assert [step["iteration"] for step in files.phases()[0].steps] == [1, 2]


def test_of_a_long_run_so_many_reports_keep_their_experts_as_can_be_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_file, "_MOST_LOADS", 60)
    (phase,) = read_phases([f"a={write_metrics(tmp_path / 'm.jsonl', 95, loss=9.0, experts=True)}"])
    assert [step["iteration"] for step in phase.steps] == list(range(1, 96))
    # Of six loads each, at most ten reports: every eighth at first, then every sixteenth.
    assert [step["iteration"] for step in phase.routed] == [16, 32, 48, 64, 80]


def test_a_running_job_is_served_and_followed(named: list[str], tmp_path: Path) -> None:
    server = ReportServer(named, "x", 0)
    threading.Thread(target=server.serve, daemon=True).start()
    with urllib.request.urlopen(server.url) as answer:
        page = answer.read().decode()
    assert 'data-live="1"' in page
    with urllib.request.urlopen(server.url + "news?seen=1") as answer:
        assert answer.status == 204
    with open(tmp_path / "dense.jsonl", "a") as file:
        step = {"iteration": 11, "loss": 1.5, "consumed_tokens": 11_000, "tokens_per_second": 5, "tflops_per_device": 1}
        file.write(json.dumps(step) + "\n")
    with urllib.request.urlopen(server.url + "news?seen=1") as answer:
        news = json.load(answer)
    assert (news["number"], news["data"]["phases"][0]["step"][-1]) == (2, 11)
    assert "<td>1.500</td>" in news["tables"]["summary"]
    assert news["sections"] == Page(page).data["sections"]
    for host in ("127.0.0.1", "localhost"):  # as browsers say it of port 80
        urllib.request.urlopen(urllib.request.Request(server.url, headers={"Host": host})).close()
    elsewhere = urllib.request.Request(server.url, headers={"Host": "elsewhere.example:80"})
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(elsewhere)
    with pytest.raises(ConfigError, match="choose another port"):
        ReportServer(named, "x", int(server.url.split(":")[2].strip("/")))
    server.close()


def test_evaluations_are_a_table_of_checkpoints_and_what_they_write(tmp_path: Path) -> None:
    path = write_metrics(tmp_path / "m.jsonl", 6, loss=5.0)
    file = MetricsFile(Path(path))
    for step, results in (
        (2, {"score": 0.51239, "x": "nan"}),
        (4, {"score": 7, "score_interval": 0.25, "text/ja/loss": 2.0}),
    ):
        folder = tmp_path / f"e{step}"
        folder.mkdir()
        row = {"prompt": "<p>", "continuation": f"text {step}"}
        (folder / "samples.json").write_text(json.dumps([row]) if step == 4 else "damaged")
        file.write({"event": "evaluation", "iteration": step, "text": "", "results": results, "folder": str(folder)})
    file.close()
    (phase,) = read_phases([f"a={path}"])
    assert evaluation_table(phase) == (
        ["checkpoint", "score", "text/ja/loss"],
        [["2", "0.5124", "-"], ["4", "7 ± 0.25", "2"]],
    )
    assert sample_table(phase) == (["prompt", "step 4"], [["<p>", "text 4"]])
    page = report_page("t", [phase])
    assert "<h2>Evaluation, a</h2>" in page
    assert "<td>&lt;p&gt;</td><td>text 4</td>" in page
