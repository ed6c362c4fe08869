"""What rows of every layout say, and which are refused or left out."""

import json
from typing import Any

import pytest

from megatron_ext.data.prepare.chat_rows import BadRow, Left, conversation_of, pair_of
from tests.unit.data.chats import turns

ASKED = turns("u", "a")


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"messages": ASKED}, ASKED),
        ({"messages": json.dumps(ASKED)}, ASKED),
        ({"messages": ASKED, "prompt": "u", "text": "x"}, ASKED),
        ({"conversations": [{"from": "human", "value": "u"}, {"from": "gpt", "value": "a"}]}, ASKED),
        (
            {"conversations": [{"from": "human", "value": "u"}, {"from": "gpt", "value": "a"}], "system": "s"},
            turns("u", "a", system="s"),
        ),
        ({"instruction": "u", "output": "a"}, ASKED),
        ({"instruction": "u", "input": "i", "output": "a", "system": "s"}, turns("u\ni", "a", system="s")),
        ({"instruction": "u2", "output": "a2", "history": [["u", "a"]]}, turns("u", "a", "u2", "a2")),
        ({"prompt": ASKED[:1], "completion": ASKED[1:]}, ASKED),
        ({"prompt": ASKED[:1], "completion": ASKED[1:], "system": "s"}, turns("u", "a", system="s")),
        ({"messages": ASKED, "system": "s"}, turns("u", "a", system="s")),
        ({"messages": turns("u", "a", system="s"), "system": "s"}, turns("u", "a", system="s")),
        ({"messages": [ASKED[0], {"role": "assistant", "content": [{"type": "text", "text": "a"}]}]}, ASKED),
    ],
    ids=str,
)
def test_layouts(row: dict[str, Any], messages: list[dict[str, str]]) -> None:
    found = conversation_of(row)
    assert list(found.messages) == messages
    assert list(found.trained) == [message["role"] == "assistant" for message in messages]


def test_strings_are_text_unless_they_are_to_be_turns() -> None:
    row = {"prompt": "u", "completion": "a"}
    assert conversation_of(row).pieces == (("u", False), ("a", True))
    assert list(conversation_of(row, strings_are_turns=True).messages) == ASKED
    assert conversation_of({"text": "t"}).pieces == (("t", True),)


def test_a_function_call_of_sharegpt_and_its_result() -> None:
    call = json.dumps({"name": "f", "arguments": {"x": 1}})
    rows = [("human", "u"), ("function_call", call), ("observation", "4"), ("gpt", "a")]
    found = conversation_of({"conversations": [{"from": who, "value": what} for who, what in rows], "tools": "[1]"})
    assert [message["role"] for message in found.messages] == ["user", "assistant", "tool", "assistant"]
    assert found.messages[1]["tool_calls"][0]["function"] == {"name": "f", "arguments": {"x": 1}}
    assert found.tools == [1]


def test_arguments_of_tool_calls_become_objects() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    found = conversation_of({"messages": [ASKED[0], {"role": "assistant", "content": None, "tool_calls": [call]}]})
    assert found.messages[1]["tool_calls"] == [{**call, "function": {"name": "f", "arguments": {"x": 1}}}]
    assert "content" not in found.messages[1]


def test_weights_of_messages_and_rows() -> None:
    messages = turns("u", "a", "u", "b")
    messages[1]["weight"] = 0
    found = conversation_of({"messages": messages, "weight": 0.25})
    assert list(found.trained) == [False, False, False, True]
    assert found.weight == 0.25
    assert all("weight" not in message for message in found.messages)
    messages[3]["train"] = False
    with pytest.raises(Left, match="nothing to train on"):
        conversation_of({"messages": messages})


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"question": "u"}, "the row has question; expected messages"),
        ({"messages": 3}, "expected a list, found int"),
        ({"messages": [{"role": "user"}]}, r"message 0 \(user\): has neither content nor tool_calls"),
        ({"messages": [{"content": "u"}]}, "expected an object with role and content"),
        ({"messages": [{**ASKED[0]}, {**ASKED[1], "weight": 0.5}]}, "weight = 0.5: a message is trained on or not"),
        ({"messages": ASKED, "weight": -1}, "weight = -1: expected a number of 0 or more"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "parts that are no text"),
        ({"conversations": [{"from": "martian", "value": "u"}]}, "turn 0: expected from"),
        ({"instruction": "u"}, "instruction without an output"),
        ({"messages": turns("u", "a", system="s"), "system": "t"}, "system is not what the conversation's own message"),
        ({"messages": ASKED, "system": 3}, "system: expected a string, found int"),
        ({"prompt": "u", "completion": "a", "system": "s"}, "text as it is has no place for it; --strings chat"),
    ],
    ids=str,
)
def test_rows_that_are_refused(row: dict[str, Any], said: str) -> None:
    with pytest.raises(BadRow, match=said):
        conversation_of(row)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": ASKED[:1]}, "no answer of the assistant"),
        ({"messages": ASKED, "weight": 0}, "weight 0"),
        ({"text": " \n"}, "empty"),
        ({"prompt": "u", "completion": ""}, "nothing to train on"),
    ],
    ids=str,
)
def test_rows_that_are_left_out(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(Left) as left:
        conversation_of(row)
    assert left.value.reason == reason


OTHER = turns("u", "b")
HH = "\n\nHuman: u\n\nAssistant: "


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": ASKED[:1], "chosen": ASKED[1:], "rejected": OTHER[1:]},
        {"prompt": "u", "chosen": ASKED[1:], "rejected": OTHER[1:]},
        {"prompt": "u", "chosen": ASKED, "rejected": OTHER},
        {"prompt": ASKED[:1], "chosen": ASKED, "rejected": OTHER},
        {"chosen": ASKED, "rejected": OTHER},
        {"chosen": HH + "a", "rejected": HH + "b"},
    ],
    ids=str,
)
def test_pairs(row: dict[str, Any]) -> None:
    pair = pair_of(row)
    assert list(pair.chosen.messages) == ASKED
    assert list(pair.rejected.messages) == OTHER
    assert list(pair.chosen.trained) == list(pair.rejected.trained) == [False, True]


def test_only_what_differs_in_a_pair_is_compared() -> None:
    pair = pair_of({"chosen": turns("u", "a", "v", "c"), "rejected": turns("u", "a", "v", "d")})
    assert list(pair.chosen.trained) == [False, False, False, True]
    assert pair_of({"prompt": "u", "chosen": "a", "rejected": "b"}).chosen.pieces == (("u", False), ("a", True))
    turned = pair_of({"prompt": "u", "chosen": "a", "rejected": "b"}, strings_are_turns=True)
    assert list(turned.rejected.messages) == OTHER


@pytest.mark.parametrize("prompt", [{}, {"prompt": "u"}], ids=["whole", "answers"])
def test_what_a_pair_says_as_system_leads_both_of_its_answers(prompt: dict[str, str]) -> None:
    begin = 1 if prompt else 0
    pair = pair_of({"chosen": ASKED[begin:], "rejected": OTHER[begin:], "system": "s", **prompt})
    assert list(pair.chosen.messages) == turns("u", "a", system="s")
    assert list(pair.rejected.messages) == turns("u", "b", system="s")
    assert list(pair.chosen.trained) == list(pair.rejected.trained) == [False, False, True]


def test_pairs_that_are_none() -> None:
    with pytest.raises(Left, match="chosen is rejected"):
        pair_of({"chosen": ASKED, "rejected": ASKED})
    with pytest.raises(Left, match="weight 0"):
        pair_of({"chosen": ASKED, "rejected": OTHER, "weight": 0})
    for row, said in [
        ({"chosen": ASKED, "rejected": OTHER, "weight": 3}, "weight = 3.0: pairs count alike"),
        ({"chosen": [ASKED[0], {**ASKED[1], "train": False}], "rejected": OTHER}, "chosen: a message has weight 0"),
        ({"chosen": ASKED}, "expected chosen and rejected"),
        ({"chosen": ASKED, "rejected": turns("v", "b")}, "no common prompt"),
        ({"chosen": ASKED, "rejected": ASKED[:1]}, "rejected has no answer"),
        ({"prompt": "w", "chosen": ASKED, "rejected": OTHER}, "prompt is not found"),
        ({"chosen": "a", "rejected": "b"}, "a string without a prompt"),
    ]:
        with pytest.raises(BadRow, match=said):
            pair_of(row)
