"""Which tokens of a conversation are trained on; every way in which that goes wrong unnoticed elsewhere is refused."""

import json
import random
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, pre_tokenizers, processors
from tokenizers import Tokenizer as Fast

from megatron_ext.data.prepare.chat_rows import BadRow, Conversation, Left, conversation_of
from megatron_ext.data.prepare.chat_samples import ChatEncoder, ChatSample
from megatron_ext.data.prepare.chat_template import ChatTemplate, read_template
from megatron_ext.data.tokenizer import Tokenizer
from megatron_ext.data.tokenizer.load import load_tokenizer
from megatron_ext.errors import ConfigError, DataError
from tests.unit.data.chats import ASKED_TO_THINK, CHATML, PLAIN_CHATML, THINKING, TOOLS, chat_tokenizer, turns
from tests.unit.data.tokenizers import unigram, write


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_tokenizer(tmp_path_factory.mktemp("chat"))


@cache
def loaded_from(directory: Path) -> tuple[Any, Tokenizer]:
    return load_tokenizer(directory), Tokenizer(directory)


def encoder_of(
    directory: Path, template: str | None = None, variables: tuple[str, ...] = (), **options: Any
) -> ChatEncoder:
    loaded, tokenizer = loaded_from(directory)
    return ChatEncoder(ChatTemplate(loaded, directory, template, variables), loaded, tokenizer, **options)


def sample_of(encoder: ChatEncoder, messages: list[dict[str, Any]], **row: Any) -> ChatSample:
    (sample,) = encoder.samples(conversation_of({"messages": messages, **row}))
    return sample


def trained(directory: Path, sample: ChatSample) -> list[str]:
    """The texts that are trained on, one for each stretch."""
    tokenizer, _ = loaded_from(directory)
    stretches: list[list[int]] = [[]]
    for number, counts in zip(sample.ids, sample.counts, strict=True):
        if counts:
            stretches[-1].append(number)
        elif stretches[-1]:
            stretches.append([])
    return [tokenizer.decode(ids) for ids in stretches if ids]


def warnings_of(directory: Path, template: str) -> list[str]:
    return ChatTemplate(loaded_from(directory)[0], directory, template).warnings


@pytest.mark.parametrize("template", [CHATML, PLAIN_CHATML], ids=["marks", "no marks"])
def test_answers_and_their_ends_are_trained_on(directory: Path, template: str) -> None:
    sample = sample_of(encoder_of(directory, template), turns("a", "b", "c", "d", system="s"))
    assert trained(directory, sample) == ["b<|im_end|>", "d<|im_end|>"]
    loaded, _ = loaded_from(directory)
    rendered = loaded.apply_chat_template(turns("a", "b", "c", "d", system="s"), chat_template=template, tokenize=False)
    assert list(sample.ids) == loaded(rendered, add_special_tokens=False).input_ids


def test_the_mask_is_that_of_transformers(directory: Path) -> None:
    """Where its own way is right: the marks stand at the top of the template."""
    (loaded, _), encoder, draw = loaded_from(directory), encoder_of(directory), random.Random(0)
    for _ in range(20):
        messages = turns(*("".join(draw.choices("abc def\n日本語é", k=draw.randint(1, 20))) for _ in range(4)))
        read = loaded.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        sample = sample_of(encoder, messages)
        assert list(sample.ids) == list(read["input_ids"])
        assert [int(counts) for counts in sample.counts] == list(read["assistant_masks"])


def test_marks_count_within_macros_and_with_spaces_taken_away(directory: Path) -> None:
    template = """{%- macro said(message) %}
{%- generation -%}
    {{ message['content'] }}<|im_end|>
{%- endgeneration %}
{%- endmacro %}
{%- for message in messages %}<|im_start|>{{ message['role'] }}
{% if message['role'] == 'assistant' %}{{ said(message) }}
{% else %}{{ message['content'] }}<|im_end|>
{% endif %}{% endfor %}"""
    assert trained(directory, sample_of(encoder_of(directory, template), turns("a", "b", "c", "d"))) == [
        "b<|im_end|>",
        "d<|im_end|>",
    ]


def test_a_template_may_change_what_messages_say(directory: Path) -> None:
    """As Llama-2 and 3, which take spaces away: what is trained on is cut by marks, not sought in the text."""
    strips = CHATML.replace("message['content'] +", "message['content'] | trim +")
    assert trained(directory, sample_of(encoder_of(directory, strips), turns(" b ", "  b\n"))) == ["b<|im_end|>"]


def test_ends_count_where_they_are_padding_too(tmp_path: Path) -> None:
    directory = chat_tokenizer(tmp_path / "t", eos_token="<|im_end|>", pad_token="<|im_end|>")
    assert trained(directory, sample_of(encoder_of(directory), turns("a", "b"))) == ["b<|im_end|>"]


def test_messages_with_weight_0_are_context(directory: Path) -> None:
    messages = turns("a", "b", "c", "d")
    messages[1]["weight"] = 0
    for template in (CHATML, PLAIN_CHATML):
        assert trained(directory, sample_of(encoder_of(directory, template), messages)) == ["d<|im_end|>"]


def test_a_template_that_takes_reasoning_away(directory: Path) -> None:
    """As Qwen3: the text of two messages is no beginning of that of four."""
    messages = turns("1+1?", "<think>\nadd\n</think>\n\n2", "again", "2")
    with pytest.raises(BadRow, match="writes what stands before message 1 otherwise .*--turns last"):
        sample_of(encoder_of(directory, THINKING), messages)
    last = sample_of(encoder_of(directory, THINKING, turns="last"), messages)
    assert trained(directory, last) == ["<think>\n\n</think>\n\n2<|im_end|>"]
    each = encoder_of(directory, THINKING, turns="unroll").samples(conversation_of({"messages": messages}))
    assert [trained(directory, sample) for sample in each] == [
        ["<think>\nadd\n</think>\n\n2<|im_end|>"],
        ["<think>\n\n</think>\n\n2<|im_end|>"],
    ]


def test_variables_of_a_template_say_what_is_trained_on(directory: Path) -> None:
    """As Qwen3, which without thinking brings an empty block in the prompt; with it, the model writes that."""
    for said, expected in (("false", "2<|im_end|>"), ("true", "<think>\n\n</think>\n\n2<|im_end|>")):
        encoder = encoder_of(directory, ASKED_TO_THINK, (f"enable_thinking={said}",))
        assert trained(directory, sample_of(encoder, turns("1+1?", "2"))) == [expected]


def test_variables_are_defaults_of_the_template(directory: Path) -> None:
    """Whoever reads the template gets what was trained on, unless they say otherwise; also within its macros."""
    loaded, _ = loaded_from(directory)

    def rendered(template: str, given: str, **said: Any) -> str:
        text = ChatTemplate(loaded, directory, template, (given,)).text
        return str(
            loaded.apply_chat_template(
                turns("u"), chat_template=text, tokenize=False, add_generation_prompt=True, **said
            )
        )

    block = "assistant\n<think>\n\n</think>\n\n"
    assert rendered(ASKED_TO_THINK, "enable_thinking=false").endswith(block)
    assert rendered(ASKED_TO_THINK, "enable_thinking=true").endswith("assistant\n")
    assert rendered(ASKED_TO_THINK, "enable_thinking=false", enable_thinking=True).endswith("assistant\n")
    macro = "\n{% macro shown() %}{{ named }}{% endmacro %}{{ shown() }}"
    assert rendered(macro, "named=no") == "\nno", "a text, as YAML 1.2 has it"


@pytest.mark.parametrize(
    ("given", "fault", "said"),
    [
        ("enable_thinkin=false", DataError, "has no such variable; it has enable_thinking"),
        ("bos_token=x", DataError, "has no such variable; it has enable_thinking"),
        ("messages=x", ConfigError, "messages is what each row says"),
        ("enable_thinking", ConfigError, "expected NAME=VALUE, such as enable_thinking=false"),
        ("enable_thinking=[1]", ConfigError, "expected a text, a number, true or false"),
        ("enable_thinking=.inf", ConfigError, "expected a text, a number, true or false"),
    ],
)
def test_variables_that_mean_nothing_are_refused(directory: Path, given: str, fault: type, said: str) -> None:
    with pytest.raises(fault, match=said):
        encoder_of(directory, ASKED_TO_THINK, (given,))


def test_what_the_generation_prompt_brings_is_not_trained_on(directory: Path) -> None:
    """As Qwen3.5, whose prompt ends with an open block of reasoning."""
    brings = "{{ '<|im_start|>assistant\n<think>\n' }}"
    plain = PLAIN_CHATML.replace("{{ '<|im_start|>assistant\n' }}", brings)
    answer = "<think>\nx\n</think>\ny"
    assert trained(directory, sample_of(encoder_of(directory, plain), turns("u", answer))) == [
        "x\n</think>\ny<|im_end|>"
    ]
    block = CHATML.replace("{{ '<|im_start|>assistant\n' }}", brings).replace(
        "{{ message['content'] + '<|im_end|>' }}", "{{ '<think>\n' + message['content'] + '<|im_end|>' }}"
    )
    with pytest.raises(DataError, match=r"marks '<think>\\n' as generated, which its generation prompt brings"):
        warnings_of(directory, block)


def test_marks_that_begin_late_and_other_prompts_are_said(directory: Path) -> None:
    late = CHATML.replace("{% generation %}{{ message", "{{ '<x>' }}{% generation %}{{ message")
    assert "'<x>' stands between the generation prompt and what is trained on" in warnings_of(directory, late)[0]
    other = CHATML.replace("{{ '<|im_start|>assistant\n' }}", "{{ 'Answer: ' }}")
    assert "is not what the template writes before an answer" in warnings_of(directory, other)[0]
    assert warnings_of(directory, CHATML) == []
    dated = "{{ strftime_now('%Y') }}" + PLAIN_CHATML
    assert "writes the date of today into every conversation" in warnings_of(directory, dated)[0]


def test_an_answer_without_an_end_is_refused(directory: Path) -> None:
    for template in (
        CHATML.replace("+ '<|im_end|>' }}{% endgeneration %}", "}}{% endgeneration %}{{ '<|im_end|>' }}"),
        "{% for message in messages %}{{ message['role'] + ':\n' + message['content'] + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant:\n' }}{% endif %}",
    ):
        with pytest.raises(BadRow, match="no control token: the model would never learn to stop"):
            sample_of(encoder_of(directory, template), turns("u", "a"))


def test_a_prompt_that_ends_with_a_space_is_refused_where_it_changes_tokens(tmp_path: Path) -> None:
    tokenizer = unigram()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    tokenizer.add_special_tokens([AddedToken("<|im_end|>", special=True)])
    directory = write(tokenizer, tmp_path / "t")
    template = (
        "{% for message in messages %}{% if message['role'] == 'assistant' %}{{ 'Assistant: ' }}"
        "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
        "{% else %}{{ message['content'] }}{% endif %}{% endfor %}"
    )
    word = next(piece[1:] for piece in Tokenizer(directory).vocabulary if piece.startswith("▁") and len(piece) > 3)
    with pytest.raises(BadRow, match="control token or a new line, not with a space"):
        sample_of(encoder_of(directory, template), turns("u", word))
    lines = template.replace("Assistant: ", "Assistant:<|im_end|>")
    assert trained(directory, sample_of(encoder_of(directory, lines), turns("u", word))) == [word + "<|im_end|>"]


def test_a_tokenizer_that_puts_a_space_in_front_of_texts(tmp_path: Path) -> None:
    """No piece can be read by itself, but the text up to each cut can."""
    tokenizer = unigram()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.add_special_tokens([AddedToken("<|im_end|>", special=True)])
    directory = write(tokenizer, tmp_path / "t")
    template = (
        "{% for message in messages %}{% if message['role'] == 'assistant' %}{% generation %}"
        "{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}"
        "{{ 'Q:' + message['content'] + '->' }}{% endif %}{% endfor %}"
    )
    sample = sample_of(encoder_of(directory, template), turns("u", "a"))
    assert trained(directory, sample) == ["a<|im_end|>"]


def test_beginning_twice_is_refused(directory: Path) -> None:
    twice = "{{ bos_token }}{{ bos_token }}" + CHATML
    with pytest.raises(BadRow, match="begins with two"):
        sample_of(encoder_of(directory, twice), turns("u", "a"))
    once = sample_of(encoder_of(directory, "{{ bos_token }}" + CHATML), turns("u", "a"))
    assert list(once.ids).count(loaded_from(directory)[0].bos_token_id) == 1


def test_it_is_said_where_whoever_generates_might_begin_twice(directory: Path, tmp_path: Path) -> None:
    """The template writes the token, and the tokenizer one more in front of any text."""
    template = "{{ bos_token }}" + CHATML
    assert warnings_of(directory, template) == []
    adding = chat_tokenizer(tmp_path / "t")
    fast = Fast.from_file(str(adding / "tokenizer.json"))
    bos = fast.token_to_id("<|endoftext|>")
    fast.post_processor = processors.TemplateProcessing("<|endoftext|> $A", None, [("<|endoftext|>", bos)])
    fast.save(str(adding / "tokenizer.json"))
    (said,) = warnings_of(adding, template)
    assert "with add_special_tokens=False, or it begins twice" in said
    assert list(sample_of(encoder_of(adding, template), turns("u", "a")).ids).count(bos) == 1


@pytest.mark.parametrize("place", [0, 1])
def test_control_tokens_spelt_in_a_row_are_refused(directory: Path, place: int) -> None:
    messages = turns("u", "a")
    messages[place]["content"] += "<|im_end|>\n<|im_start|>assistant"
    with pytest.raises(BadRow, match=r"message \d .* spells the control token '<\|im_end\|>'"):
        sample_of(encoder_of(directory), messages)
    with pytest.raises(BadRow, match="spells the control token"):
        list(encoder_of(directory).samples(conversation_of({"prompt": "u", "completion": "<|im_end|>"})))
    with pytest.raises(BadRow, match="tools: spells the control token"):
        sample_of(encoder_of(directory, TOOLS), turns("u", "a"), tools=[{"properties": {"<|im_end|>": 1}}])


def test_tools(directory: Path) -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    messages = [
        {"role": "user", "content": "u"},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "content": "4"},
        {"role": "assistant", "content": "a"},
    ]
    sample = sample_of(encoder_of(directory, TOOLS), messages, tools=[{"type": "function", "function": {"name": "f"}}])
    assert trained(directory, sample) == ['f:{"x": 1}<|im_end|>', "a<|im_end|>"]
    silent = TOOLS.replace("message['tool_calls'] or []", "[]").replace("{% if tools %}", "{% if false %}")
    with pytest.raises(BadRow, match="leaves out tools, tool_calls without a word"):
        sample_of(encoder_of(directory, silent), messages, tools=[{"name": "f"}])


def test_messages_and_reasoning_that_a_template_leaves_out_are_refused(directory: Path) -> None:
    """As Gemma's without a word for system; a message that the template writes otherwise is not left out."""
    opening = "{% for message in messages %}"
    unknown = CHATML.replace(opening, "{% for message in messages if message['role'] != 'system' %}")
    late = CHATML.replace(opening, opening + "{% if loop.first or message['role'] != 'system' %}").replace(
        "{% endfor %}", "{% endif %}{% endfor %}"
    )
    system, asked = {"role": "system", "content": "s3"}, turns("u", "a")
    for template, messages, number in ((unknown, [system, *asked], 0), (late, [*asked, system, *asked], 2)):
        with pytest.raises(BadRow, match=f"leaves out message {number}, of the role system, without a word"):
            sample_of(encoder_of(directory, template), messages)
    sample_of(encoder_of(directory, late), [system, *asked])
    other = CHATML.replace("{{ message['content'] + '<|im_end|>\n' }}", "{{ message['content'] | upper }}<|im_end|>\n")
    sample_of(encoder_of(directory, other), [{**system, "content": "said"}, *asked])
    reasoned = [asked[0], {**asked[1], "reasoning_content": "since"}]
    for name in ("reasoning_content", "thinking"):
        with pytest.raises(BadRow, match=f"leaves out {name} without a word"):
            sample_of(encoder_of(directory), [asked[0], {**asked[1], name: "since"}])
    written = CHATML.replace("{% generation %}", "{% generation %}{{ message['reasoning_content'] }}")
    for more in ({}, {"reasoning": "since"}):
        both = [asked[0], {**reasoned[1], **more}]
        assert trained(directory, sample_of(encoder_of(directory, written), both)) == ["sincea<|im_end|>"]


def test_what_a_template_raises_is_said(directory: Path) -> None:
    template = "{{ raise_exception('roles must alternate') }}" + CHATML
    with pytest.raises(BadRow, match="refuses it: roles must alternate"):
        sample_of(encoder_of(directory, template), turns("u", "a"))
    with pytest.raises(DataError, match="has no chat template; give one with --chat-template"):
        ChatTemplate(load_tokenizer(chat_tokenizer(directory / "none", None)), directory)


def test_long_conversations(directory: Path) -> None:
    messages = turns("a", "b", "c" * 50, "d")
    short = sample_of(encoder_of(directory), messages[:2])
    most = len(short.ids)
    with pytest.raises(Left, match="too long"):
        sample_of(encoder_of(directory, max_tokens=most), messages)
    assert sample_of(encoder_of(directory, max_tokens=most, cut_long=True), messages) == short
    with pytest.raises(Left, match="too long"):
        sample_of(encoder_of(directory, max_tokens=most - 1, cut_long=True), messages)


def test_plain_text_is_read_as_in_pretraining_and_cut_where_it_is_long(directory: Path) -> None:
    tokenizer = Tokenizer(directory)
    text = "user assistant 日本語 <|im_end|>"
    whole = [*tokenizer.encode(text), tokenizer.eod]
    for most in (3, 5, len(whole) - 1, len(whole)):
        samples = list(encoder_of(directory, max_tokens=most).samples(Conversation(pieces=((text, True),))))
        assert all(1 < len(sample.ids) <= most for sample in samples)
        assert [number for sample in samples for number in sample.ids] == whole
        assert all(list(sample.counts) == [False] + [True] * (len(sample.ids) - 1) for sample in samples)
    (pair,) = encoder_of(directory).samples(conversation_of({"prompt": "u:", "completion": " a"}))
    assert trained(directory, pair) == [" a<|endoftext|>"]


def test_a_file_that_is_no_template_is_refused(tmp_path: Path) -> None:
    good = "{% for message in messages %}{{ message.content }}{% endfor %}"
    (tmp_path / "good.jinja").write_text(good)
    assert read_template(tmp_path / "good.jinja") == good
    way_out = "give a file of Jinja that writes `messages`, such as a model's chat_template.jinja"
    (tmp_path / "folder").mkdir()
    for name, content, fault in (
        ("folder", None, "Is a directory"),
        ("missing", None, "No such file or directory"),
        ("binary", b"\x80\x00\x01", r"cannot be read as a chat template \(not UTF-8 at byte 0\)"),
        ("zeros", bytes(64), "writes no messages"),
        ("empty", b" \n", "is empty"),
        ("plain.txt", b"Hello", "writes no messages"),
        ("other.jinja", b"{{ prompt }}", "writes no messages"),
        ("broken.jinja", b"{% for m in messages %}", "cannot be read as a chat template .*endfor"),
        ("tokenizer_config.json", json.dumps({"chat_template": good}).encode(), "is JSON"),
    ):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=f"{name}: {fault}.*; {way_out}"):
            read_template(tmp_path / name)
