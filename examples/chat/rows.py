#!/usr/bin/env python
"""Rows for teaching a small model to chat: conversations, questions set aside, and pairs about not getting stuck.

python examples/chat/rows.py CHATS ANSWERS OUTPUT          chats.jsonl, questions.jsonl and pairs.jsonl into OUTPUT

CHATS holds conversations; ANSWERS those that pairs are made of, or preferences, of which the chosen answer is taken.
Which of two real answers is the right one, a model of a few minutes cannot see. That an answer repeats itself it can,
and it does so itself. So the rule is: an answer is chosen, and rejected is the same answer stuck at a character, drawn
from its second quarter: from there on the 2 to 8 characters before it come again and again. It ends at four fifths of
the characters, which are about as many tokens, so that neither is told by its length.
"""

import json
import os
import random
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

FEWEST_CHARACTERS = 16
MOST_PAIRS, QUESTIONS = 3000, 40
Messages = list[dict[str, Any]]


def conversations(path: Path) -> Iterator[Messages]:
    """The messages of each row of a file, or of the files of a folder."""
    for file in sorted(path.glob("*.jsonl")) if path.is_dir() else [path]:
        for line in file.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            yield row["messages"] if "messages" in row else [*row["prompt"], *row["chosen"]]


def stuck(answer: str, draws: random.Random) -> str | None:
    """`answer` as a model gets stuck in it; None where it is too short, or repeats itself already."""
    if len(answer) < FEWEST_CHARACTERS:
        return None
    at = draws.randrange(len(answer) // 4, len(answer) // 2)
    piece = answer[max(at - draws.randint(2, 8), 0) : at]
    repeated = (answer[:at] + piece * len(answer))[: len(answer) * 4 // 5]
    return None if answer.startswith(repeated) else repeated


def pairs_of(rows: Iterable[Messages], draws: random.Random) -> Iterator[dict[str, Messages]]:
    """A pair of each row whose answer can get stuck."""
    for *prompt, last in rows:
        if (repeated := stuck(last["content"], draws)) is not None:
            yield {"prompt": prompt, "chosen": [last], "rejected": [{**last, "content": repeated}]}


def write(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write a file of rows; it has its name when it is whole."""
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    os.replace(unfinished, path)


def main() -> None:
    """Write the files; what is asked later stands in none of the others."""
    chats, answers, output = map(Path, sys.argv[1:])
    output.mkdir(parents=True, exist_ok=True)
    rows, draws = list(conversations(chats)), random.Random(0)
    questions = {messages[-2]["content"]: messages[:-1] for messages in rows[:: max(len(rows) // QUESTIONS, 1)]}
    kept = [messages for messages in rows if messages[-2]["content"] not in questions]
    pairs = list(pairs_of((one for one in conversations(answers) if one[-2]["content"] not in questions), draws))
    draws.shuffle(pairs)
    write(output / "chats.jsonl", ({"messages": messages} for messages in kept))
    write(output / "questions.jsonl", ({"messages": messages} for messages in questions.values()))
    write(output / "pairs.jsonl", pairs[:MOST_PAIRS])
    print(f"{output}: {len(kept):,} chats, {len(questions)} questions, {len(pairs[:MOST_PAIRS]):,} pairs")


if __name__ == "__main__":
    main()
