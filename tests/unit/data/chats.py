"""A tokenizer with ChatML's control tokens, and chat templates of the kinds that are met."""

from pathlib import Path
from typing import Any

from tokenizers import AddedToken

from tests.unit.data.tokenizers import byte_level, write

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ message['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PLAIN_CHATML = CHATML.replace("{% generation %}", "").replace("{% endgeneration %}", "")
# As Qwen3: earlier reasoning goes, the last answer gets an empty block of it.
THINKING = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% set said = message['content'].split('</think>\n\n')[-1] %}"
    "{% if message['role'] == 'assistant' and loop.last %}"
    "{% if '</think>' in message['content'] %}{{ message['content'] }}"
    "{% else %}{{ '<think>\n\n</think>\n\n' + said }}{% endif %}"
    "{% else %}{{ said }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# As Qwen3 since 2025: asked not to, it begins answers with an empty block.
ASKED_TO_THINK = THINKING.replace(
    "{{ '<|im_start|>assistant\n' }}{% endif %}",
    "{{ '<|im_start|>assistant\n' }}{% if enable_thinking is defined and enable_thinking is false %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}",
)
TOOLS = (
    "{% if tools %}{{ tools | tojson + '\n' }}{% endif %}{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}{% generation %}"
    "{{ message['content'] or '' }}{% for call in message['tool_calls'] or [] %}"
    "{{ call['function']['name'] + ':' + call['function']['arguments'] | tojson }}{% endfor %}{{ '<|im_end|>' }}"
    "{% endgeneration %}{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def chat_tokenizer(directory: Path, template: str | None = CHATML, **settings: Any) -> Path:
    """Write a byte-level tokenizer with ChatML's tokens; `<|endoftext|>` ends documents and begins texts."""
    tokenizer = byte_level()
    tokenizer.add_special_tokens([AddedToken("<|im_start|>", special=True), AddedToken("<|im_end|>", special=True)])
    given = {"bos_token": "<|endoftext|>", **settings}
    return write(tokenizer, directory, **given, **({} if template is None else {"chat_template": template}))


def turns(*texts: str, system: str | None = None) -> list[dict[str, Any]]:
    """Messages of user and assistant in turn."""
    said = [{"role": "assistant" if n % 2 else "user", "content": text} for n, text in enumerate(texts)]
    return [*([{"role": "system", "content": system}] if system else []), *said]
