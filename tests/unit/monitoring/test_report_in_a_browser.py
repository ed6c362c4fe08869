"""The report as a browser draws it, without a complaint on its console: used, followed, on a phone."""

import json
import re
import shutil
import subprocess
import threading
from pathlib import Path

import pytest

from megatron_ext.files import write_text
from megatron_ext.monitoring.kept_results import METRICS, evaluation_folder
from megatron_ext.monitoring.report import read_phases, write_report
from megatron_ext.monitoring.report.serve import ReportServer
from tests.support.waiting import HANGS

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def browse(address: str, folder: Path, width: int = 1280) -> subprocess.CompletedProcess[str]:
    """Open the page and let its scripts run; stdout is what became of it, stderr has what the console says."""
    if BROWSER is None:
        pytest.skip("no Chromium here")
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    command += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    command += [f"--user-data-dir={folder / 'profile'}", f"--window-size={width},900", "--virtual-time-budget=2000"]
    command += ["--enable-logging=stderr", "--dump-dom", address]
    return subprocess.run(command, capture_output=True, text=True, timeout=HANGS)


USED = """<script>
const over = document.querySelector("#curves .u-over"), place = over.getBoundingClientRect();
const at = (target, kind, share) => target.dispatchEvent(new MouseEvent(kind, {
  clientX: place.left + share * place.width, clientY: place.top + 20, bubbles: true, button: 0, movementX: 9 }));
document.querySelectorAll("input[type=checkbox]")[1].click();  // smoothed
const results = document.documentElement.dataset;
results.evaluated = document.querySelectorAll("#evaluation-0 ~ .evaluated .plot .u-legend").length;
results.smoothed = document.querySelectorAll("#curves .plot")[0].textContent.includes("dense, smoothed");
setTimeout(() => {
  const fresh = document.querySelector("#curves .u-over");
  at(fresh, "mouseenter", 0.25); at(fresh, "mousemove", 0.222);
  setTimeout(() => {
    results.note = document.querySelector("#curves .note").textContent;
    results.hover = document.querySelector("#curves .u-legend").textContent.includes("3000");
    at(fresh, "mousedown", 0.2); at(fresh, "mousemove", 0.6); at(document, "mouseup", 0.6);
    setTimeout(() => { drawAll(); results.zoomed = zooms.has("curves loss (nats a token)"); }, 100);
  }, 100);
}, 100);
</script></body>"""


def test_a_reader_zooms_hovers_and_smoothes(named: list[str], tmp_path: Path) -> None:
    for step, score in ((2, 0.25), (4, 0.75)):
        place = evaluation_folder(tmp_path / f"iter_{step:07}") / "lm_eval.json"
        write_text(place, json.dumps({METRICS: {"arc/acc": score, "arc/acc_interval": 0.1, "once": 1} | {"x": score}}))
    write_report(tmp_path / "r.html", "x", read_phases(named), [], None)
    page = (tmp_path / "r.html").read_text().replace("</body>", USED)
    (tmp_path / "r.html").write_text(page)
    done = browse((tmp_path / "r.html").as_uri(), tmp_path)
    assert "CONSOLE" not in done.stderr, done.stderr
    assert 'data-smoothed="true"' in done.stdout
    assert 'data-hover="true"' in done.stdout
    assert 'data-evaluated="3"' in done.stdout
    assert 'data-note="MoE, step 3, skip: a &lt;/script&gt; spike"' in done.stdout.replace(
        "</script>", "&lt;/script&gt;"
    )
    assert 'data-zoomed="true"' in done.stdout


def test_a_browser_follows_a_running_job(named: list[str], tmp_path: Path) -> None:
    class Running(ReportServer):
        """The run takes another step whenever somebody has looked."""

        def page(self) -> bytes:
            shown = super().page()
            step = {"iteration": 11, "loss": 1.5, "consumed_tokens": 11_000}
            with open(tmp_path / "dense.jsonl", "a") as file:
                file.write(json.dumps({**step, "tokens_per_second": 5, "tflops_per_device": 1}) + "\n")
            return shown

    server = Running(named, "x", 0)
    threading.Thread(target=server.serve, daemon=True).start()
    done = browse(server.url, tmp_path)
    server.close()
    assert "CONSOLE" not in done.stderr, done.stderr
    assert "<td>1.500</td>" in done.stdout
    assert "live; looked at" in done.stdout


def test_a_phone_draws_it(named: list[str], tmp_path: Path) -> None:
    write_report(tmp_path / "r.html", "x", read_phases(named), [], None)
    done = browse((tmp_path / "r.html").as_uri(), tmp_path, 390)
    # Seven curves; three of the sources of one run, two heat maps and four curves for its experts, parts of its steps.
    assert re.search(r'data-drawn="17"', done.stdout), done.stderr
    assert "CONSOLE" not in done.stderr, done.stderr
