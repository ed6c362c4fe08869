"""Loads exports under whatever transformers is imported, in a process of its own, and checks what they compute.

    python run_under_transformers.py DIRECTORY...

Each directory holds an export and `expected.pt` (tokens, logits, generated) from another version of transformers.
Prints one JSON object a directory.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers


def measure(directory: Path) -> dict[str, Any]:
    """Largest difference of the logits over their scale, and whether all ways to generate agree."""
    expected = torch.load(directory / "expected.pt")
    options: dict[str, Any] = {"trust_remote_code": True, "torch_dtype": torch.float32}
    network = transformers.AutoModelForCausalLM.from_pretrained(directory, **options).eval()
    eager = transformers.AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager", **options).eval()
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    prompt, mask = expected["prompt"], expected["mask"]
    with torch.no_grad():
        differences = [
            float((network_.forward(expected["tokens"]).logits - expected["logits"]).abs().max())
            for network_ in (network, eager)
        ]
        generated = [
            network.generate(prompt, attention_mask=mask, use_cache=use_cache, **settings)
            for use_cache in (True, False)
        ]
    network.train().gradient_checkpointing_enable()
    network(expected["tokens"], labels=expected["tokens"]).loss.backward()
    learned = [p.grad is not None for n, p in network.named_parameters() if p.requires_grad and ".experts." not in n]
    network.save_pretrained(directory / "saved")
    again = transformers.AutoModelForCausalLM.from_pretrained(directory / "saved", **options).eval()
    with torch.no_grad():
        saved = torch.equal(again(expected["tokens"]).logits, network.eval()(expected["tokens"]).logits)
    rounded = transformers.AutoModelForCausalLM.from_pretrained(directory, **options | {"torch_dtype": torch.bfloat16})
    kept = {n: tensor.dtype for n, tensor in rounded.state_dict().items() if tensor.dtype != torch.bfloat16}
    return {
        "transformers": transformers.__version__,
        "difference": max(differences) / float(expected["logits"].abs().max()),
        "generates": all(torch.equal(ids, expected["generated"]) for ids in generated),
        "learns": all(learned),
        "saves": saved,
        "in fp32 in a bf16 model": sorted({name.rpartition(".")[2] for name in kept if kept[name] == torch.float32}),
    }


if __name__ == "__main__":
    for place in sys.argv[1:]:
        print(json.dumps(measure(Path(place))))
