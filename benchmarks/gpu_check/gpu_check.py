"""One GPU, some minutes: is the torch backend right on CUDA, how fast is it, and where does the time go?

bash benchmarks/gpu_check/gpu_check.sh [--tiny] [--budget 480] [--parts "checks;64 experts|torch, bf16"]

Every part is a process of its own with a time limit; what is there is written to $OUT (build/gpu_check) after each:
gpu_check.json and gpu_check.txt (figures), tests.txt, profile.txt, log.txt. Parts, in order:

kernels   what the card gives, and single operations as this repository writes them, each beside what was predicted
own       our Triton kernels (runtime.kernels: triton), and the loss by parts: are they the torch formula, are they
          repeatable, and both timed
tests     tests/gpu by pytest-xdist where it is there
checks    what tests/gpu lacks: idle experts, documents, loss, repeatability, waits for the device
steps     the step of benchmarks/gpu.py for each shape and precision: TFLOP/s, memory, then one step profiled
compiled  what torch.compile would give for the operations that are not fused
"""

import argparse
import contextlib
import importlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import answers

ROOT = Path.cwd()
# (part, argument, most seconds). Order: what must be known first, then what changes decisions most.
PLAN = [
    ("kernels", "", 75),
    ("own", "", 60),
    ("tests", "", 150),
    ("checks", "", 60),
    ("steps", "dense|torch, bf16", 60),
    ("steps", "64 experts|torch, bf16", 60),
    ("steps", "dense|torch, fp8 delayed", 60),
    ("steps", "8x8B|torch, bf16", 60),
    ("steps", "64 experts|torch, fp8 delayed", 60),
    ("steps", "dense|our kernels, bf16", 45),
    ("steps", "64 experts|our kernels, bf16", 45),
    ("steps", "dense|our kernels, fp8 delayed", 45),
    ("steps", "64 experts|our kernels, fp8 delayed", 45),
    ("steps", "dense|our kernels, fp8 delayed, weights each time", 45),
    ("steps", "dense|our kernels, bf16, loss by parts", 45),
    ("steps", "dense|torch, fp8 tensorwise", 45),
    ("compiled", "", 75),
    ("steps", "dense|Transformer Engine, bf16", 60),
    ("steps", "64 experts|Transformer Engine, bf16", 60),
    ("steps", "dense|Transformer Engine, fp8 tensorwise", 60),
    ("steps", "64 experts|Transformer Engine, fp8 tensorwise", 60),
    ("steps", "8x8B|torch, fp8 delayed", 60),
    ("steps", "dense|megatron-core local, bf16", 45),
    ("steps", "dense|torch, fp8 rowwise", 45),
    ("steps", "64 experts|torch, fp8 rowwise", 60),
]


class Part:
    """A part in a process of its own. It imports at once, and begins when it is told to."""

    def __init__(self, number: int, part: str, argument: str, tiny: bool) -> None:
        self.answer = answers.OUT / f".answer-{number}.json"
        self.answer.unlink(missing_ok=True)
        command = [sys.executable, __file__, "--child", part, "--argument", argument, "--answer", str(self.answer)]
        self.process = subprocess.Popen(
            command + (["--tiny"] if tiny else []), stdin=subprocess.PIPE, start_new_session=True
        )

    def run(self, limit: float) -> dict:
        """What it knows when it ends, or when its time is over."""
        ended = None
        try:
            assert self.process.stdin is not None
            self.process.stdin.write(b"go\n")
            self.process.stdin.close()
            code = self.process.wait(limit)
            ended = None if code == 0 else f"exit code {code}"
        except subprocess.TimeoutExpired:
            ended = f"over its {limit:.0f} s"
        except OSError as error:
            ended = f"died before it began: {error}"
        self.end()
        result = json.loads(self.answer.read_text()) if self.answer.exists() else {}
        self.answer.unlink(missing_ok=True)
        return {**result, **({"ended": ended} if ended else {})}

    def end(self) -> None:
        """End it and all it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def write(results: dict) -> None:
    """gpu_check.json and gpu_check.txt as far as they are known."""
    (answers.OUT / "gpu_check.json").write_text(json.dumps(results, indent=1, default=str))
    lines = []
    for key, value in results.items():
        part = value.get("result", {})
        lines.append(f"## {key}: {value['seconds']:.0f} s{', ' + part['ended'] if 'ended' in part else ''}")
        lines += [f"  {k}: {v}" for k, v in part.items() if k not in ("profile", "ended")]
        if "profile" in part:
            lines += [f"  {k}: {v}" for k, v in part["profile"].items() if k != "top"]
    (answers.OUT / "gpu_check.txt").write_text("\n".join(lines) + "\n")


def main() -> None:
    """Run the plan, or as a child one part of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, on CPU where there is no GPU")
    parser.add_argument("--budget", type=float, default=480, help="seconds after which no part begins (default 480)")
    parser.add_argument("--parts", help="leave out parts whose name and argument have none of these texts (a;b)")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--argument", default="", help=argparse.SUPPRESS)
    parser.add_argument("--answer", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    answers.TINY = arguments.tiny
    if arguments.child:
        answers.ANSWER = Path(arguments.answer)
        sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
        module = importlib.import_module(f"part_{arguments.child}")  # takes seconds, and no GPU
        sys.stdin.readline()
        answers.keep(module.part(arguments.argument))
        return
    answers.OUT.mkdir(parents=True, exist_ok=True)
    (answers.OUT / "profile.txt").unlink(missing_ok=True)
    summarize(run(planned(arguments.parts), arguments.budget, arguments.tiny))


def planned(wanted: str | None) -> list[tuple[str, str, str, float]]:
    """What of the plan is to run here: key, part, argument, most seconds."""
    plan = [(f"{part} {argument}".strip(), part, argument, limit) for part, argument, limit in PLAN]
    if wanted:
        plan = [entry for entry in plan if any(text in entry[0] for text in wanted.split(";"))]
    if importlib.util.find_spec("transformer_engine") is None:
        plan = [entry for entry in plan if "Transformer Engine" not in entry[0]]
    return plan


def run(plan: list[tuple[str, str, str, float]], budget: float, tiny: bool) -> dict[str, dict]:
    """The results of every part; those for which no time is left are skipped."""
    results: dict[str, dict] = {}
    begin = time.monotonic()
    ahead = 2 if (os.cpu_count() or 1) >= 8 else 1  # processes that import while another measures
    waiting: dict[int, Part] = {}
    for number, (key, _, _, limit) in enumerate(plan):
        left = budget - (time.monotonic() - begin)
        if left < 15:
            results[key] = {"seconds": 0, "result": {"skipped": "the budget is spent"}}
            continue
        for later in range(number, min(number + ahead, len(plan))):
            if later not in waiting:
                waiting[later] = Part(later, *plan[later][1:3], tiny)
        answers.say(f"\n# {key} (at {time.monotonic() - begin:.0f} s)")
        started = time.monotonic()
        result = waiting[number].run(min(limit, left))
        results[key] = {"seconds": time.monotonic() - started, "result": result}
        write(results)
    for part in waiting.values():
        part.end()
    write(results)
    answers.say(f"\n# done after {time.monotonic() - begin:.0f} s\n")
    return results


def summarize(results: dict[str, dict]) -> None:
    """A line for each part."""
    shown = ("TFLOP/s", "tokens/s", "peak GiB", "summary", "failed", "ended", "skipped")
    for key, value in results.items():
        part = value["result"]
        short = {name: part[name] for name in shown if part.get(name)}
        bad = [name for name, v in part.items() if isinstance(v, dict) and (v.get("ok") is False or "error" in v)]
        answers.say(f"{key:50} {value['seconds']:5.0f} s  {short}{'  NOT OK: ' + '; '.join(bad) if bad else ''}")


if __name__ == "__main__":
    main()
