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
    # What hangs shows where; what ran before the time is over is in the file.
    command += ["-v", "-rA", "--tb=short", "--durations=10", "-o", "faulthandler_timeout=60", f"--junitxml={xml}"]
    command += ["-o", "addopts="]
    if importlib.util.find_spec("xdist"):
        # What a module's tests share is made once: every process it is in imports megatron-core for seconds.
        command += ["-n", "4" if not answers.TINY else "2", "--dist", "loadfile"]
    with (answers.OUT / "tests.txt").open("w") as file:
        code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT).returncode
    output = (answers.OUT / "tests.txt").read_text()
    differences = re.findall(r"^(\w+ \w+ \w+): largest relative difference.*?([\d.e+-]+)$", output, re.M)
    last = [line for line in output.splitlines() if re.search(r"\d+ (passed|failed|skipped|error)", line)][-1:]
    failed = re.findall(r"^(?:FAILED|ERROR) (.*)$", output, re.M)
    for line in [*failed, *last]:
        answers.say(line)
    return {"summary": last, "failed": failed[:40], "differences": dict(differences), "rc": code}
