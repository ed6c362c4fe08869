"""Chat templates: a conversation as text, cut where what is trained on begins and ends.

The cuts are those of the template's own marks, `{% generation %}` ... `{% endgeneration %}`: the template is rendered
once as it is and once with a character behind each mark, and both must say the same. Without marks a turn is what is
added to the conversation before it, with the beginning of an answer; that works for templates whose text of some turns
is the beginning of their text of more.
"""

import contextlib
import json
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from megatron_ext.data.prepare.chat_rows import ASSISTANT, BadRow, Conversation
from megatron_ext.data.prepare.template_variables import names_in, with_variables
from megatron_ext.errors import DataError
from megatron_ext.foreign import reading

Pieces = list[tuple[str, int | None]]
"""Text, and the number of the message that it is the trained part of, or None."""

_BEGIN, _END = "\ufdd0", "\ufdd1"  # noncharacters: Unicode has them in no text
_MARK = re.compile(r"{%(?P<left>[-+]?)\s*(?P<end>end)?generation\s*(?P<right>[-+]?)%}")
_USER, _ANSWER = "eb41", "c7f0"
_THOUGHTS = ("reasoning_content", "reasoning", "thinking")
"""What an answer may have beside its content, by the names that templates know."""
_DIGITS = "9317406852"  # which no template writes in another case
_NAME, _ARGUMENT, _RESULT, _TOOL = "fn5b1", "ar7d2", "re93f", "to4c6"
WAYS_OUT = (
    "give a training template with {% generation %} marks (--chat-template), or train on the last answer of each row "
    "(--turns last), or make a sample of each answer (--turns unroll)"
)


class ChatTemplate:
    """A template, rendered by the tokenizer that transformers loads.

    Args:
        loaded: that tokenizer.
        text: the template; default: that of the tokenizer.
        variables: NAME=VALUE, what variables of it are where nobody says otherwise.

    Raises:
        DataError: there is no template or no such variable, or its marks train on what a generation prompt brings.
    """

    def __init__(self, loaded: Any, directory: Path, text: str | None = None, variables: Sequence[str] = ()) -> None:
        self._loaded, self._directory = loaded, directory
        self.text = with_variables(_template_of(loaded, directory) if text is None else text, variables)
        self.has_marks = bool(_MARK.search(self.text))
        self._marked = _MARK.sub(_with_character, self.text)
        self._control = [token.content for token in loaded.added_tokens_decoder.values() if token.special]

    @cached_property
    def warnings(self) -> list[str]:
        """What people should know of the template; of its marks by a conversation of two messages.

        Raises:
            DataError: see above.
        """
        dated = []
        if "strftime_now" in self.text:
            dated.append(
                f"{self._directory}: the chat template writes the date of today into every conversation; give one "
                "that does not (--chat-template)"
            )
        return [*dated, *self._warnings_of_beginnings(), *self._warnings_of_marks()]

    def _warnings_of_beginnings(self) -> list[str]:
        """Data has one token where a text begins; who generates might get two."""
        bos = self._loaded.bos_token
        try:
            text = self._render([{"role": "user", "content": _USER}], None, answering=True)
        except BadRow:
            return []
        if bos is None or not text.startswith(bos) or self._loaded(bos).input_ids.count(self._loaded.bos_token_id) < 2:
            return []
        return [
            f"{self._directory}: the chat template writes {bos!r}, and the tokenizer puts one in front of any text: "
            "encode what the template has written with add_special_tokens=False, or it begins twice"
        ]

    def _warnings_of_marks(self) -> list[str]:
        if not self.has_marks:
            return []
        asked = [{"role": "user", "content": _USER}]
        try:
            prompt = self._render(asked, None, answering=True)
            pieces = self._marked_pieces(Conversation([*asked, {"role": ASSISTANT, "content": _ANSWER}], (False, True)))
        except BadRow:
            return []  # it wants more than that: the rows say what is wrong
        begin = len(pieces[0][0]) if pieces and pieces[0][1] is None else 0
        if not "".join(text for text, _ in pieces).startswith(prompt):
            return [
                f"{self._directory}: its generation prompt, {prompt!r:.200}, is not what the template writes before an "
                "answer: generation begins elsewhere than training does"
            ]
        if begin < len(prompt):
            raise DataError(
                f"{self._directory}: the chat template marks {prompt[begin:]!r} as generated, which its generation "
                "prompt brings: the model would be trained to write it again. Put {% generation %} behind that"
            )
        if begin > len(prompt):
            behind = "".join(text for text, _ in pieces)[len(prompt) : begin]
            return [
                f"{self._directory}: {behind!r} stands between the generation prompt and what is trained on: the model "
                "never learns to write it"
            ]
        return []

    def pieces(self, conversation: Conversation) -> Pieces:
        """The text of a conversation in pieces; joined, they are the rendered template.

        Raises:
            BadRow: the template refuses the conversation, leaves parts of it out, or its turns cannot be told apart.
        """
        self._require_tools(conversation)
        pieces = self._marked_pieces(conversation) if self.has_marks else self._added_pieces(conversation)
        self._require_written(conversation, "".join(text for text, _ in pieces))
        return pieces

    def prompt(self, conversation: Conversation) -> str:
        """What a model goes on from to answer `conversation`: all of it, and how an answer begins.

        Raises:
            BadRow: the template refuses it, or leaves out what it has of tools.
        """
        self._require_tools(conversation)
        text = self._render(conversation.messages, conversation.tools, answering=True)
        self._require_written(conversation, text)
        return text

    def _marked_pieces(self, conversation: Conversation) -> Pieces:
        messages, tools = conversation.messages, conversation.tools
        marked = self._render(messages, tools, template=self._marked)
        if marked.replace(_BEGIN, "").replace(_END, "") != self._render(messages, tools):
            raise BadRow("marks change the text", "the marks of the chat template change what it writes; move them")
        pieces: Pieces = []
        numbers = iter([n for n, message in enumerate(messages) if message["role"] == ASSISTANT])
        for outside_and_inside in marked.split(_END):
            outside, mark, inside = outside_and_inside.partition(_BEGIN)
            if _BEGIN in inside:
                raise BadRow("marks within marks", "the chat template has {% generation %} within {% generation %}")
            pieces.append((outside, None))
            if not mark:
                continue
            if (number := next(numbers, None)) is None:
                raise BadRow("marks are not answers", "the chat template marks more parts than there are answers")
            pieces.append((inside, number if conversation.trained[number] else None))
        if (left := next(numbers, None)) is not None:
            raise BadRow("marks are not answers", f"the chat template marks nothing for the answer, message {left}")
        return _joined(pieces)

    def _added_pieces(self, conversation: Conversation) -> Pieces:
        messages, tools = conversation.messages, conversation.tools
        whole, pieces, done = self._render(messages, tools), Pieces(), 0
        for number, is_trained in enumerate(conversation.trained):
            if not is_trained:
                continue
            before = self._render(messages[:number], tools, answering=True)
            behind = whole if number + 1 == len(messages) else self._render(messages[: number + 1], tools)
            said = behind[len(before) :]
            said = said[: self._end_of_turn(said)]
            if not behind.startswith(before) or not whole.startswith(before + said):
                raise BadRow(
                    "turns cannot be told apart",
                    f"the chat template has no {{% generation %}} marks, and writes what stands before message "
                    f"{number} otherwise once that has followed; {WAYS_OUT}",
                )
            pieces += [(whole[done : len(before)], None), (said, number)]
            done = len(before) + len(said)
        return _joined([*pieces, (whole[done:], None)])

    def _end_of_turn(self, said: str) -> int:
        """Where a turn ends: behind its last control token, if only spaces follow that."""
        ends = [said.rindex(token) + len(token) for token in self._control if token in said]
        end = max(ends, default=len(said))
        return end if not said[end:].strip() else len(said)

    def _render(
        self, messages: Sequence[Mapping[str, Any]], tools: Any, *, template: str | None = None, answering: bool = False
    ) -> str:
        try:
            rendered = self._loaded.apply_chat_template(
                [dict(message) for message in messages],
                tools=tools,
                chat_template=template or self.text,
                add_generation_prompt=answering,
                tokenize=False,
            )
        except Exception as error:  # templates are programs: they may raise anything
            raise BadRow("refused by the template", f"the chat template refuses it: {error}") from error
        return str(rendered)

    def _require_tools(self, conversation: Conversation) -> None:
        """Raise BadRow where the template leaves out, without a word, what it has of tools and reasoning."""
        has = {
            "tools": bool(conversation.tools),
            "tool_calls": any(message.get("tool_calls") for message in conversation.messages),
            "messages of the role tool": any(message["role"] == "tool" for message in conversation.messages),
        }
        for message in conversation.messages:
            thoughts = {name for name in _THOUGHTS if message.get(name)}
            # Some have the same under two names.
            has |= dict.fromkeys(thoughts, True) if thoughts <= self._leaves_out else {}
        if lost := [what for what, is_there in has.items() if is_there and what in self._leaves_out]:
            raise BadRow("left out by the template", f"the chat template leaves out {', '.join(lost)} without a word")

    @cached_property
    def _leaves_out(self) -> frozenset[str]:
        """What of tools the template does not write, seen on a conversation in which each part has its own word."""
        call = {
            "type": "function",
            "id": "callabcd1",
            "function": {"name": _NAME, "arguments": {_ARGUMENT: _ARGUMENT}},
        }
        properties = {_ARGUMENT: {"type": "string", "description": _ARGUMENT}}
        parameters = {"type": "object", "properties": properties, "required": [_ARGUMENT]}
        tool = {"type": "function", "function": {"name": _TOOL, "description": _TOOL, "parameters": parameters}}
        messages: list[dict[str, Any]] = [
            {"role": "user", "content": _USER},
            {"role": ASSISTANT, "content": "", "tool_calls": [call]},
            {"role": "tool", "name": _NAME, "tool_call_id": "callabcd1", "content": _RESULT},
            {"role": ASSISTANT, "content": _ANSWER},
        ]
        try:
            text = self._render(messages, [tool])
        except BadRow:
            return self._leaves_out_reasoning()  # it says so itself, of the row
        written = {
            "tools": _TOOL in text,
            "tool_calls": _NAME in text and _ARGUMENT in text,
            "messages of the role tool": _RESULT in text,
        }
        return frozenset(what for what, is_there in written.items() if not is_there) | self._leaves_out_reasoning()

    def _leaves_out_reasoning(self) -> frozenset[str]:
        """Many templates take that of earlier answers away; of the last one only those that know none of it."""
        lost = set()
        for name in _THOUGHTS:
            reasoned = {"role": ASSISTANT, name: _RESULT, "content": _ANSWER}
            with contextlib.suppress(BadRow):
                if _RESULT not in self._render([{"role": "user", "content": _USER}, reasoned], None):
                    lost.add(name)
        return frozenset(lost)

    def _require_written(self, conversation: Conversation, text: str) -> None:
        """Raise BadRow where the template leaves out a message: of a role, or at a place, that it does not know.

        Templates change what messages say, so that one not found in `text` is looked for once more, as a number.
        """
        messages = list(conversation.messages)
        for number, message in enumerate(messages):
            said = message.get("content", "").strip()
            if message["role"] in (ASSISTANT, "tool") or said in text:
                continue
            others = [*messages[:number], {**message, "content": _DIGITS}, *messages[number + 1 :]]
            if _DIGITS not in self._render(others, conversation.tools):
                raise BadRow(
                    "left out by the template",
                    f"the chat template leaves out message {number}, of the role {message['role']}, without a word",
                )


def read_template(path: str | Path) -> str:
    """The template in a file.

    Raises:
        DataError: it cannot be read, or is something else: nothing in it writes a conversation.
    """
    with reading(path, DataError, kind="a chat template", advice=_A_TEMPLATE):
        text = Path(path).read_text(encoding="utf-8")
        names = names_in(text)
    # A tokenizer_config.json may have a template in it, and parse as one.
    if "messages" not in names or _is_json(text):
        said = "is JSON" if _is_json(text) else "writes no messages" if text.strip() else "is empty"
        raise DataError(f"{path}: {said}; {_A_TEMPLATE}")
    return text


_A_TEMPLATE = "give a file of Jinja that writes `messages`, such as a model's chat_template.jinja"


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _template_of(loaded: Any, directory: Path) -> str:
    template = loaded.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    if not template:
        raise DataError(
            f"{directory}: the tokenizer has no chat template; give one with --chat-template FILE.jinja (it is kept "
            "with the data, in a copy of the tokenizer that runs and exports then use)"
        )
    return str(template)


def _with_character(mark: re.Match[str]) -> str:
    """A mark with a character on its inner side; what spaces it takes away on either side, it takes still."""
    if mark["end"]:
        return f'{{%{mark["left"]} endif %}}{{{{ "{_END}" }}}}{{% endgeneration {mark["right"]}%}}'
    return f'{{%{mark["left"]} generation %}}{{{{ "{_BEGIN}" }}}}{{% if true {mark["right"]}%}}'


def _joined(pieces: Pieces) -> Pieces:
    """Without empty pieces, and with neighbours that are not trained on in one."""
    joined: Pieces = []
    for text, number in pieces:
        if joined and joined[-1][1] is None and number is None:
            joined[-1] = (joined[-1][0] + text, None)
        elif text:
            joined.append((text, number))
    return joined
