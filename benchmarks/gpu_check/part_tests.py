"""The tests that need a GPU, with what they printed."""

import importlib.util
import re
import subprocess
import sys

import answers


def part(_: str) -> dict:
    """tests/gpu; the output goes to tests.txt."""
    xml = answers.OUT / "tests.xml"
    command = [sys.executable, "-m", "pytest", "tests/gpu", "-p", "no:cacheprovider"]
    if importlib.util.find_spec("transformer_engine") is None:
        command += ["-k", "not transformer_engine"]
    command += ["-rA", "--tb=short", f"--junitxml={xml}", "-o", "addopts="]
    if importlib.util.find_spec("xdist"):
        # What a module's tests share is made once: every process it is in imports megatron-core for seconds.
        command += ["-n", "4" if not answers.TINY else "2", "--dist", "loadfile"]
    done = subprocess.run(command, capture_output=True, text=True)
    (answers.OUT / "tests.txt").write_text(done.stdout[-400_000:] + done.stderr[-20_000:])
    differences = re.findall(r"^(\w+ \w+ \w+): largest relative difference.*?([\d.e+-]+)$", done.stdout, re.M)
    last = [line for line in done.stdout.splitlines() if re.search(r"\d+ (passed|failed|skipped|error)", line)][-1:]
    failed = re.findall(r"^(?:FAILED|ERROR) (.*)$", done.stdout, re.M)
    for line in [*failed, *last]:
        answers.say(line)
    return {"summary": last, "failed": failed[:40], "differences": dict(differences), "rc": done.returncode}
