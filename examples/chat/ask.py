#!/usr/bin/env python
"""Ask an exported model through transformers alone, by its own chat template: it knows where its answers end.

python examples/chat/ask.py HF_DIRECTORY QUESTIONS.jsonl OUTPUT.json     some of them
"""

import json
import os
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

QUESTIONS, MOST_TOKENS = 6, 60


def conversations(path: Path) -> list[list[dict[str, str]]]:
    """Some rows of a file, far from each other."""
    rows = [json.loads(line)["messages"] for line in path.open(encoding="utf-8")]
    return rows[:: max(len(rows) // QUESTIONS, 1)][:QUESTIONS]


def main() -> None:
    """Ask, print and write."""
    directory, questions, output = map(Path, sys.argv[1:])
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    rows = []
    for messages in conversations(questions):
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        # The template writes all control tokens there are.
        prompt = tokenizer(text, add_special_tokens=False, return_tensors="pt")
        made = model.generate(**prompt, max_new_tokens=MOST_TOKENS, do_sample=False)[0, prompt["input_ids"].shape[1] :]
        rows.append({"prompt": text, "continuation": tokenizer.decode(made)})
        print(f"{messages[-1]['content']}\n  -> {tokenizer.decode(made, skip_special_tokens=True)}")
    unfinished = output.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(rows, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    os.replace(unfinished, output)


if __name__ == "__main__":
    main()
