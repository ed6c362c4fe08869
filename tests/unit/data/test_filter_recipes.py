"""The recipes of examples/filters at work: what they keep, what they leave out, personal data masked."""

import pytest

from megatron_ext.data.prepare.filters import Dropped, chain_of

WEB = """\
The library opened in the spring of the year and the people of the town came to read there in the evening.
They sat at long tables with lamps, and the books that they wanted were brought to them by two young clerks.
It was said that the oldest of the books had been copied by hand, and that nobody had read it to the end.
In the second year the council paid for a new room with windows that looked over the river and the bridge.
Children were allowed to come in the morning, and a teacher from the school told them stories about the sea.
Those who could not read yet listened, and most of them learned it before the winter had come to its end.
"""
JAPANESE = (
    "図書館は春に開館し、町の人々は夕方になると本を読みに来た。長い机にはランプが置かれ、若い司書が二人で本を運んでいた。"
    "最も古い本は手で書き写されたものだと言われ、最後まで読んだ者は誰もいなかった。二年目には川と橋を望む部屋が増え、"
    "子どもたちは午前中に来て、先生から海の話を聞いた。\n"
)


MAIL = "Write to anna.schmidt@library-of-town.org, or look at the server 85.214.132.117 for more, not at 192.168.0.1.\n"


def test_personal_data_of_web_text_is_masked_by_datatrove() -> None:
    pytest.importorskip("datatrove")
    from examples.filters.web import PIIFormatter

    masked = PIIFormatter().format(WEB + MAIL)
    assert masked.startswith(WEB + "Write to ")
    for secret in ("anna.schmidt", "library-of-town", "85.214.132.117"):
        assert secret not in masked
    assert masked.endswith("for more, not at 192.168.0.1.\n")  # an address that is nobody's


def test_web_text_by_datatrove() -> None:
    pytest.importorskip("datatrove")
    pytest.importorskip("spacy")
    keep = chain_of(["examples.filters.web:Web"], 0, None, None)
    masked = keep(WEB + MAIL)
    assert isinstance(masked, str)
    assert "anna.schmidt" not in masked
    assert keep(WEB) == WEB
    assert isinstance(keep("buy now! " * 50), Dropped)


def test_japanese_text_by_hojichar() -> None:
    pytest.importorskip("hojichar")
    keep = chain_of(["examples.filters.japanese:Japanese"], 0, None, None)
    masked = keep(JAPANESE + "問い合わせは 090-1234-5678 または taro@example.jp まで。\n")
    assert isinstance(masked, str)
    assert JAPANESE.strip() in masked
    assert "5678" not in masked
    assert "taro@" not in masked
    assert keep("too short") == Dropped("DocumentLengthFilter")
