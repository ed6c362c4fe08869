"""How tokens are chosen: as transformers chooses, each prompt for itself; stop texts, streams, prompts of files."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from megatron_ext.errors import DataError
from megatron_ext.generation.prompts import Encoder, Prompt, command_line_prompts, read_prompts
from megatron_ext.generation.sample import Continuing, continued
from megatron_ext.generation.sampling import Sampling, Streamer
from megatron_ext.generation.text_model import TextModel, text_model
from megatron_ext.model_io.convert import convert
from tests.unit.data.chats import CHATML, chat_tokenizer, turns
from tests.unit.model_io.own_models import MODELS, write_checkpoint


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    directory = tmp_path_factory.mktemp("chat")
    tokenizer = chat_tokenizer(directory / "tokenizer")
    own = replace(MODELS["Tanuki with a shared expert"], vocab_size=352)
    convert(write_checkpoint(directory / "megatron", own), directory / "hf", tokenizer=tokenizer)
    with text_model(directory / "hf") as opened:
        yield opened


PROMPTS = [Prompt(text) for text in ("the model learns from text", "a", "two b", "日本語")]


def texts(model: TextModel, how: Continuing, prompts: Sequence[Prompt] = PROMPTS) -> list[str]:
    return [made.text for made in continued(model, prompts, how)]


def test_greedy_in_batches_is_what_transformers_generates(model: TextModel) -> None:
    how = Continuing(max_new_tokens=12, batch_size=3)
    for prompt, made in zip(PROMPTS, continued(model, PROMPTS, how), strict=True):
        ids = model.tokenizer(prompt.text, return_tensors="pt")["input_ids"]
        new = model.network.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12, pad_token_id=0
        )
        assert made.text == model.tokenizer.decode(new[0, ids.shape[1] :], skip_special_tokens=True)
        assert made.tokens == new.shape[1] - ids.shape[1] or made.ended


def test_a_prompt_is_drawn_for_by_itself(model: TextModel) -> None:
    how = Continuing(Sampling(1.2, top_k=50, top_p=0.9, repetition_penalty=1.3, seed=3), 8, batch_size=4)
    together = texts(model, how)
    assert together == texts(model, replace(how, batch_size=1))
    assert together[:2] == texts(model, how, PROMPTS[:2])
    assert together != texts(model, replace(how, sampling=replace(how.sampling, seed=4)))
    streamed: list[str] = []
    (third,) = continued(model, PROMPTS[2:3], how, write=streamed.append, first=2)
    assert "".join(streamed) == third.text == together[2]


def test_draws_follow_the_probabilities_that_transformers_processors_leave() -> None:
    scores = torch.randn(1, 40, generator=torch.Generator().manual_seed(0)) * 2
    before = torch.tensor([[3, 7, 7, 11]])
    theirs = LogitsProcessorList(
        [
            RepetitionPenaltyLogitsProcessor(1.4),
            TemperatureLogitsWarper(0.7),
            TopKLogitsWarper(12),
            TopPLogitsWarper(0.9),
        ]
    )
    expected = theirs(before, scores.clone()).softmax(-1)[0]
    rows = 20_000
    steps = Sampling(0.7, 12, 0.9, 1.4, seed=1).processors(range(rows), [0] * rows)
    # The penalty goes row by row: seen once. What follows is the same for every row.
    made = Sampling(repetition_penalty=1.4).processors([0], [2])[0](torch.tensor([[3, 0, *before[0]]]), scores.clone())
    assert torch.equal(made, RepetitionPenaltyLogitsProcessor(1.4)(before, scores.clone()))
    drawn = made.expand(rows, -1)
    for step in steps[1:]:
        drawn = step(before.expand(rows, -1), drawn)
    found = torch.bincount(drawn.argmax(-1), minlength=40) / rows
    assert bool((found[expected == 0] == 0).all())
    assert float((found - expected).abs().max()) < 5 * 0.5 / rows**0.5  # five standard deviations


def test_extreme_temperatures_are_the_likeliest_token_and_any_that_is_allowed() -> None:
    """Beyond what fp32 can divide by there are no probabilities: what was written came of NaN."""
    scores, ids = torch.tensor([[1.0, 3.0, 2.0, -torch.inf]]), torch.tensor([[0]])
    found: dict[float, set[int]] = {}
    for temperature in (1e-300, 1e-50, 1e300):
        chosen = set[int]()
        for number in range(40):
            after = scores.clone()
            for step in Sampling(temperature, top_p=0.99).processors([number], [0]):
                after = step(ids, after)
            chosen.add(int(after.argmax()))
        found[temperature] = chosen
    assert found == {1e-300: {1}, 1e-50: {1}, 1e300: {0, 1, 2}}


def test_no_seed_draws_for_a_prompt_what_another_draws_for_its_neighbour() -> None:
    rows = [Sampling(1.0, seed=seed).processors(range(8), [0] * 8)[-1] for seed in range(8)]
    drawn = torch.cat([step(torch.zeros(8, 1, dtype=torch.long), torch.zeros(8, 16)) for step in rows])
    assert len(drawn.unique(dim=0)) == 64


def test_a_stop_text_ends_a_continuation_and_is_no_part_of_it(model: TextModel) -> None:
    how = Continuing(max_new_tokens=12)
    whole = texts(model, how)
    stop = next(text for text in whole if len(text) > 4)[2:4]
    for text, made in zip(whole, continued(model, PROMPTS, replace(how, stop=[stop])), strict=True):
        assert made.text == text.partition(stop)[0]
        assert made.ended or stop not in text
        assert made.tokens < 12 or not made.ended
    with pytest.raises(DataError, match="--stop ''"):
        texts(model, replace(how, stop=[""]))


def test_a_stream_writes_no_part_of_a_character_or_of_a_stop() -> None:
    pieces: list[str] = []
    streamer = Streamer(lambda ids: bytes(ids).decode(errors="replace"), pieces.append, ["##"])
    streamer.put(torch.tensor([[1, 2, 3]]))  # the prompt
    for byte in "aé#b##c".encode():
        streamer.put(torch.tensor([byte]))
    streamer.end()
    assert [piece for piece in pieces if piece] == ["a", "é", "#b"]


def test_conversations_are_written_by_the_template_up_to_the_answer(model: TextModel, tmp_path: Path) -> None:
    asked = "<|im_start|>system\nShort.<|im_end|>\n<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
    (prompt,) = command_line_prompts(["q"], chat=True, system="Short.")
    assert model.tokenizer.decode(Encoder(model).encode(prompt)) == asked
    other = CHATML.replace("assistant\n' }}", "bot\n' }}")
    (listed,) = command_line_prompts([json.dumps(turns("q", system="Short."))], chat=True)
    assert model.tokenizer.decode(Encoder(model, other).encode(listed)) == asked.replace("assistant", "bot")
    rows: list[dict[str, Any]] = [
        {"messages": turns("q", "an answer that is made anew", system="Short.")},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "system": "Short."},
        {"prompt": "q"},
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for prompt in read_prompts(file, chat=True, system="Short."):
        assert model.tokenizer.decode(Encoder(model).encode(prompt)) == asked
    assert read_prompts(file, chat=False)[2].conversation is None
    (tmp_path / "lines.txt").write_text("one\n\ntwo\n")
    assert [prompt.text for prompt in read_prompts(tmp_path / "lines.txt", chat=False)] == ["one", "two"]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ('{"other": 1}\n', "rows.jsonl, row 1: the row has other; expected prompt, text"),
        ('{"text": 3}\n', "rows.jsonl, row 1: text = 3: expected a text"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}\n', "row 1: the conversation asks nothing"),
        ("", "rows.jsonl: "),
    ],
)
def test_rows_that_are_no_prompts_are_said(text: str, complaint: str, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(text)
    with pytest.raises(DataError, match=complaint):
        read_prompts(tmp_path / "rows.jsonl", chat=True)
