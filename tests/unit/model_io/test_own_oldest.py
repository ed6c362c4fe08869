"""Our exported class under the oldest transformers it is for, in a process with that version."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_ext.model_io.logits import load_hugging_face
from tests.support.waiting import HANGS
from tests.unit.model_io.own_models import MODELS, export, left_padded, tokens

HERE = Path(__file__).parent
# One of each kind of attention, positions, norm, router and noise.
TRIED = (
    "GPT-2 with experts",
    "Tanuki with a shared expert",
    "Qwen2-MoE with learned noise",
    "OLMoE with biases",
    "dynamic",
    "yarn, latent, DeepSeek's factors",
)
OLDEST = HERE.parents[2] / ".transformers-oldest"


@torch.no_grad()
def write_expected(exported: Path) -> None:
    """What the transformers of this process computes."""
    network = load_hugging_face(exported)
    prompt, mask = left_padded(tokens(2, 8), [8, 5])
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected = {
        "tokens": tokens(),
        "logits": network(tokens()).logits,
        "prompt": prompt,
        "mask": mask,
        "generated": network.generate(prompt, attention_mask=mask, **settings),
    }
    torch.save(expected, exported / "expected.pt")


def run_under(packages: Path, exports: list[Path], modules: Path) -> list[dict[str, object]]:
    """What run_under_transformers.py reports of `exports` with the packages of `packages`."""
    environment = {**os.environ, "PYTHONPATH": str(packages), "HF_MODULES_CACHE": str(modules), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, str(HERE / "run_under_transformers.py"), *map(str, exports)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=HANGS,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.skipif(not (OLDEST / ".ready").is_file(), reason="not installed; make .transformers-oldest/.ready")
def test_exports_work_under_the_oldest_transformers(tmp_path: Path) -> None:
    exports = {name: export(tmp_path / str(number), name)[1] for number, name in enumerate(TRIED)}
    for exported in exports.values():
        write_expected(exported)
    results = run_under(OLDEST, list(exports.values()), tmp_path / "modules")
    pinned = (HERE.parents[2] / "requirements" / "oldest_transformers.txt").read_text()
    for name, result in zip(exports, results, strict=True):
        print(f"{name}: {result}")
        assert f"transformers=={result['transformers']}\n" in pinned
        # Another version, the same kernels of torch: measured 0 to 2e-6 of the logits' scale.
        assert result["difference"] < 1e-5
        assert result["generates"]
        assert result["learns"]
        assert result["saves"]
        expected = ["e_score_correction_bias"] if MODELS[name].moe_router_enable_expert_bias else []
        assert result["in fp32 in a bf16 model"] == expected
