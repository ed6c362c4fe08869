"""What a row of chat data says, whichever of the usual layouts it has: messages, tools, weights; pairs of answers."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from megatron_ext.data.prepare.faults import BadDocument

ASSISTANT = "assistant"
_ROLES = {  # of ShareGPT
    "human": "user",
    "user": "user",
    "gpt": ASSISTANT,
    "chatgpt": ASSISTANT,
    "assistant": ASSISTANT,
    "bing": ASSISTANT,
    "bard": ASSISTANT,
    "system": "system",
    "observation": "tool",
    "tool": "tool",
    "function_call": ASSISTANT,
}
_LAYOUTS = (
    "messages, conversations (ShareGPT), instruction and output (Alpaca), prompt and completion, or text; pairs: "
    "chosen and rejected, with or without prompt"
)
_OPENING = ("system", "developer", "user")
"""Roles of a conversation's first message; an answer has none of them."""
_TURN = re.compile(r"\n\n(Human|Assistant):")
"""How the strings of hh-rlhf tell turns apart."""


class BadRow(BadDocument):
    """A row that must not be trained on; `reason` says in a few words why, for counting."""

    def __init__(self, reason: str, why: str) -> None:
        super().__init__(why)
        self.reason = reason


class Left(Exception):
    """A row that is left out without being wrong; `reason` is counted."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True)
class Conversation:
    """One row.

    Attributes:
        messages: as chat templates take them; empty where the row is plain text.
        trained: for each message whether it is trained on; only those of the assistant are.
        tools: descriptions of tools, if any.
        pieces: instead of messages, text as it is, and whether it is trained on.
        weight: of the row, with task.weighting = row.
        layout: which the row has.
    """

    messages: Sequence[Mapping[str, Any]] = ()
    trained: Sequence[bool] = ()
    tools: Sequence[Any] | None = None
    pieces: Sequence[tuple[str, bool]] = ()
    weight: float = 1.0
    layout: str = "messages"


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt, which both conversations begin with."""

    chosen: Conversation
    rejected: Conversation


def conversation_of(row: Mapping[str, Any], *, strings_are_turns: bool = False) -> Conversation:
    """The conversation of a row.

    Args:
        strings_are_turns: prompt and completion that are strings are a user's turn and its answer; otherwise they are
            text as it is, without a template.

    Raises:
        BadRow: it has none of the layouts, or is damaged.
        Left: there is nothing to train on.
    """
    row = _filled(row)
    weight, tools = _weight(row), _tools(row)
    if weight == 0:
        raise Left("weight 0")
    if "messages" in row:
        return _led(_whole(row["messages"], tools, weight, "messages"), row)
    if "conversations" in row:
        return _led(_whole(_of_sharegpt(row["conversations"]), tools, weight, "conversations"), row)
    if "instruction" in row:
        return _led(_whole(_of_alpaca(row), tools, weight, "instruction"), row)
    if "prompt" in row and "completion" in row:
        return _led(_of_completion(row["prompt"], row["completion"], tools, weight, strings_are_turns), row)
    if "text" in row:
        text = _string(row["text"], "text")
        if not text.strip():
            raise Left("empty")
        return Conversation(pieces=((text, True),), weight=weight, layout="text")
    raise BadRow("no known layout", f"the row has {_keys(row)}; expected {_LAYOUTS}")


def asked_of(row: Mapping[str, Any]) -> Conversation:
    """What a row asks: its conversation without the answer at the end, if it has one, for a model to answer.

    Raises:
        BadRow: it has no conversation, or one that asks nothing.
    """
    row = _filled(row)
    if "messages" in row:
        messages, _ = _messages(row["messages"], "messages")
    elif "conversations" in row:
        messages, _ = _messages(_of_sharegpt(row["conversations"]), "conversations")
    elif "instruction" in row:
        messages = _of_alpaca({"output": "", **row})
    elif isinstance(row.get("prompt"), list):
        messages, _ = _messages(row["prompt"], "prompt")
    else:
        raise BadRow("no known layout", f"the row has {_keys(row)}; expected prompt, text, or {_LAYOUTS}")
    while messages and messages[-1]["role"] == ASSISTANT:
        messages.pop()
    if not messages:
        raise BadRow("no question", "the conversation asks nothing")
    return _led(Conversation(messages, [False] * len(messages), tools=_tools(row)), row)


def pair_of(row: Mapping[str, Any], *, strings_are_turns: bool = False) -> Pair:
    """The two answers of a row of preferences.

    Raises:
        BadRow: there are no two answers to one prompt.
        Left: both answers are the same.
    """
    row = _filled(row)
    if "chosen" not in row or "rejected" not in row:
        raise BadRow("no known layout", f"the row has {_keys(row)}; expected chosen and rejected")
    chosen, rejected, prompt = row["chosen"], row["rejected"], row.get("prompt")
    if (weight := _weight(row)) == 0:
        raise Left("weight 0")
    if weight != 1:
        raise BadRow("bad weight", f"weight = {weight}: pairs count alike; remove it")
    if chosen == rejected:
        raise Left("chosen is rejected")
    if isinstance(chosen, str) and isinstance(rejected, str):
        if prompt is None or _TURN.match(chosen):
            chosen, rejected, prompt = _of_hh(chosen, "chosen"), _of_hh(rejected, "rejected"), None
        elif isinstance(prompt, str) and not strings_are_turns:
            both = (Conversation(pieces=((prompt, False), (one, True)), layout="pair") for one in (chosen, rejected))
            return Pair(*(_led(one, row) for one in both))
        else:
            chosen, rejected = ([{"role": ASSISTANT, "content": one}] for one in (chosen, rejected))
    pair = _pair_of_messages(prompt, chosen, rejected, _tools(row))
    return Pair(_led(pair.chosen, row), _led(pair.rejected, row))


def _pair_of_messages(prompt: Any, chosen: Any, rejected: Any, tools: Sequence[Any] | None) -> Pair:
    before = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else _parsed(prompt, "prompt") or []
    begin, _ = _messages(before, "prompt")
    first, first_counts = _messages(chosen, "chosen")
    second, second_counts = _messages(rejected, "rejected")
    if begin and all(one and one[0]["role"] in _OPENING for one in (first, second)):
        # Whole conversations beside a prompt that says their beginning, or their question, once more.
        said = begin if not isinstance(prompt, str) else begin[:1]
        if any(not all(message in one for message in said) for one in (first, second)):
            raise BadRow(
                "no common prompt", "chosen and rejected are whole conversations, in which prompt is not found"
            )
        begin = []
    common = 0
    while common < min(len(first), len(second)) and first[common] == second[common]:
        common += 1
    prompt_length = len(begin) + common
    if not prompt_length:
        raise BadRow("no common prompt", "chosen and rejected answer no common prompt: their first messages differ")
    both = []
    for name, answer, counts in (("chosen", first, first_counts), ("rejected", second, second_counts)):
        whole = [*begin, *answer]
        trained = [n >= prompt_length and message["role"] == ASSISTANT for n, message in enumerate(whole)]
        if not any(trained):
            raise BadRow("no answer", f"{name} has no answer of the assistant behind what both have in common")
        if trained[prompt_length:] != list(counts[common:]):
            raise BadRow("bad weight", f"{name}: a message has weight 0, but all of an answer is compared; remove it")
        both.append(Conversation(whole, trained, tools, layout="pair"))
    return Pair(*both)


def _led(conversation: Conversation, row: Mapping[str, Any]) -> Conversation:
    """`conversation` behind what its row says as `system`, unless it begins with that."""
    first: Mapping[str, Any] = {"role": "system", "content": _string(row.get("system", ""), "system")}
    if not first["content"] or first in conversation.messages[:1]:
        return conversation
    if conversation.pieces:
        raise BadRow("no place for system", "system: text as it is has no place for it; --strings chat has")
    if conversation.messages[:1] and conversation.messages[0]["role"] == "system":
        raise BadRow("two systems", "system is not what the conversation's own message of that role says")
    return replace(conversation, messages=[first, *conversation.messages], trained=[False, *conversation.trained])


def _whole(raw: Any, tools: Sequence[Any] | None, weight: float, layout: str) -> Conversation:
    messages, trained = _messages(raw, layout)
    if not any(message["role"] == ASSISTANT for message in messages):
        raise Left("no answer of the assistant")
    if not any(trained):
        raise Left("nothing to train on")
    return Conversation(messages, trained, tools, weight=weight, layout=layout)


def _messages(raw: Any, layout: str) -> tuple[list[dict[str, Any]], list[bool]]:
    """Messages without what only says whether they are trained on, and that."""
    messages, trained = [], []
    for number, message in enumerate(_listed(_parsed(raw, layout), layout)):
        where = f"{layout}, message {number}"
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise BadRow("no known layout", f"{where}: expected an object with role and content, found {message!r:.80}")
        kept = {name: value for name, value in message.items() if name not in ("weight", "train") and value is not None}
        if "content" in kept:
            kept["content"] = _content(kept["content"], where)
        elif not kept.get("tool_calls"):
            raise BadRow("no content", f"{where} ({kept['role']}): has neither content nor tool_calls")
        if kept.get("tool_calls"):
            kept["tool_calls"] = [_call(call, where) for call in _listed(kept["tool_calls"], where)]
        messages.append(kept)
        trained.append(_is_trained(message, where) and kept["role"] == ASSISTANT)
    return messages, trained


def _is_trained(message: Mapping[str, Any], where: str) -> bool:
    for name in ("weight", "train"):
        if (value := message.get(name)) is not None and value not in (0, 1):
            raise BadRow(
                "bad weight", f"{where}: {name} = {value!r}: a message is trained on or not, 0 or 1; a row may have any"
            )
    return message.get("weight") != 0 and message.get("train") != 0


def _content(content: Any, where: str) -> str:
    if isinstance(content, list):
        parts = [
            part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in content
        ]
        if any(not isinstance(part, str) for part in parts):
            raise BadRow("not text", f"{where}: its content has parts that are no text")
        return "".join(part for part in parts if part)
    return _string(content, where)


def _call(call: Any, where: str) -> dict[str, Any]:
    """A tool call, its arguments as an object: what templates write as JSON, which a string would be twice."""
    if not isinstance(call, dict):
        raise BadRow("bad tool call", f"{where}: tool_calls holds {call!r:.80}")
    inner = call.get("function", call)
    if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
        raise BadRow("bad tool call", f"{where}: a tool call needs the name of a function, found {call!r:.80}")
    arguments = inner.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except ValueError as error:
            raise BadRow("bad tool call", f"{where}: arguments of {inner['name']} are no JSON ({error})") from error
    inner = {**inner, "arguments": {} if arguments is None else arguments}
    return (
        {"type": "function", **call, "function": inner}
        if "function" in call
        else {"type": "function", "function": inner}
    )


def _of_sharegpt(raw: Any) -> list[dict[str, Any]]:
    turns = _listed(_parsed(raw, "conversations"), "conversations")
    found: list[dict[str, Any]] = []
    for number, turn in enumerate(turns):
        if isinstance(turn, dict) and "role" in turn:
            found.append(turn)
            continue
        speaker = turn.get("from") if isinstance(turn, dict) else None
        if speaker not in _ROLES or "value" not in turn:
            known = ", ".join(_ROLES)
            raise BadRow(
                "no known layout",
                f"conversations, turn {number}: expected from (one of {known}) and value, found {turn!r:.80}",
            )
        message = {name: turn[name] for name in ("weight", "train") if name in turn}
        value = _string(turn["value"], f"conversations, turn {number}")
        if speaker == "function_call":
            calls = _parsed(value, f"conversations, turn {number}")
            message |= {"role": ASSISTANT, "tool_calls": calls if isinstance(calls, list) else [calls]}
        else:
            message |= {"role": _ROLES[speaker], "content": value}
        found.append(message)
    return found


def _of_alpaca(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    asked, given = _string(row["instruction"], "instruction"), row.get("input")
    if isinstance(given, str) and given:
        asked = f"{asked}\n{given}"
    found: list[dict[str, Any]] = []
    for number, turn in enumerate(row.get("history") or []):
        if not isinstance(turn, list | tuple) or len(turn) != 2:
            raise BadRow("no known layout", f"history, entry {number}: expected [question, answer], found {turn!r:.80}")
        found += [{"role": "user", "content": turn[0]}, {"role": ASSISTANT, "content": turn[1]}]
    if not isinstance(row.get("output"), str):
        raise BadRow("no known layout", f"the row has {_keys(row)}: instruction without an output that is a string")
    return [*found, {"role": "user", "content": asked}, {"role": ASSISTANT, "content": row["output"]}]


def _of_completion(
    prompt: Any, completion: Any, tools: Sequence[Any] | None, weight: float, strings_are_turns: bool
) -> Conversation:
    if isinstance(prompt, str) and isinstance(completion, str):
        if not completion:
            raise Left("nothing to train on")
        if not strings_are_turns:
            pieces = ((prompt, False), (completion, True))
            return Conversation(pieces=pieces, weight=weight, layout="prompt and completion")
        prompt, completion = [{"role": "user", "content": prompt}], [{"role": ASSISTANT, "content": completion}]
    before, _ = _messages(prompt, "prompt")
    behind, trained = _messages(completion, "completion")
    if not any(trained):
        raise Left("nothing to train on")
    whole = [*before, *behind]
    return Conversation(whole, [False] * len(before) + trained, tools, weight=weight, layout="prompt and completion")


def _of_hh(text: str, name: str) -> list[dict[str, Any]]:
    parts = _TURN.split(text)
    if len(parts) < 3 or parts[0].strip():
        raise BadRow(
            "no known layout",
            f"{name} is a string without a prompt: expected turns, which '\\n\\nHuman:' or '\\n\\nAssistant:' begins",
        )
    roles = {"Human": "user", "Assistant": ASSISTANT}
    return [
        {"role": roles[speaker], "content": said.strip()}
        for speaker, said in zip(parts[1::2], parts[2::2], strict=True)
    ]


def _filled(row: Mapping[str, Any]) -> dict[str, Any]:
    """What a row has; in tables each has every column that any has."""
    if row.get("chat_template_kwargs"):
        raise BadRow(
            "variables of its own",
            "chat_template_kwargs: rows have no variables of the chat template of their own; remove it, and give "
            "tools/preprocess.py those of all rows as --template-variables",
        )
    return {name: value for name, value in row.items() if value is not None}


def _weight(row: Mapping[str, Any]) -> float:
    weight = row.get("weight")
    if weight is None:
        return 1.0
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < float("inf"):
        raise BadRow("bad weight", f"weight = {weight!r}: expected a number of 0 or more")
    return float(weight)


def _tools(row: Mapping[str, Any]) -> Sequence[Any] | None:
    tools = _parsed(row["tools"], "tools") if row.get("tools") else None
    return None if not tools else _listed(tools, "tools")


def _parsed(value: Any, name: str) -> Any:
    """A value that may be JSON within a string, as columns of tables hold it."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError as error:
        raise BadRow("no known layout", f"{name}: a string that is no JSON ({error})") from error


def _listed(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list | tuple):
        raise BadRow("no known layout", f"{where}: expected a list, found {type(value).__name__}")
    return list(value)


def _string(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise BadRow("not text", f"{where}: expected a string, found {type(value).__name__}")
    return value


def _keys(row: Mapping[str, Any]) -> str:
    names = ", ".join(list(row)[:10]) + (", ..." if len(row) > 10 else "")
    return names or "nothing"
