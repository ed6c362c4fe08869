"""Ids of documents are those of transformers' own class, whatever the tokenizer; what cannot be read is said."""

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Fast
from tokenizers import normalizers
from transformers import AutoTokenizer

from megatron_ext.checkpoint.tokenizer_files import copy_tokenizer, has_tokenizer
from megatron_ext.data.indexed import token_dtype
from megatron_ext.data.tokenizer import Tokenizer
from megatron_ext.data.tokenizer.apart import received
from megatron_ext.data.tokenizer.probe import HARD_TEXTS
from megatron_ext.errors import DataError
from tests.unit.data.tokenizers import (
    LINES,
    byte_level,
    harmony,
    sentencepiece_model,
    unigram,
    with_marks,
    word_piece,
    write,
    write_settings,
)

KINDS = {
    "byte-level BPE": byte_level,
    "byte-level BPE of gpt-oss": harmony,
    "BPE with marks": lambda: with_marks(byte_level()),
    "unigram with marks": lambda: with_marks(unigram()),
    "unigram, NFKC": lambda: unigram(normalizers.NFKC()),
    "WordPiece": word_piece,
}


@pytest.fixture(params=KINDS)
def directory(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return write(KINDS[request.param](), tmp_path / "t")


def test_ids_are_those_of_transformers_and_special_tokens_stay_text(directory: Path) -> None:
    ours, theirs = Tokenizer(directory), AutoTokenizer.from_pretrained(directory)
    assert ours.eod == theirs.convert_tokens_to_ids("<|endoftext|>")
    assert ours.vocab_size == max(theirs.get_vocab().values()) + 1
    for text in (*HARD_TEXTS, *LINES, "\n".join(LINES), "a <tool> b"):
        ids = theirs(text, add_special_tokens=False, split_special_tokens=True).input_ids
        if ours.eod not in ids:
            assert ours.encode(text) == ids, text
    for text in ("before <|endoftext|> after", "<|endoftext|>", "the<|endoftext|>the"):
        assert ours.eod not in ours.encode(text)
        assert len(ours.encode(text)) > 1
    if theirs.convert_tokens_to_ids("<tool>") not in (None, theirs.unk_token_id):
        assert theirs.convert_tokens_to_ids("<tool>") in ours.encode("a <tool> b")


def test_a_copy_in_another_process_reads_alike(directory: Path) -> None:
    ours = Tokenizer(directory)
    text = f"{LINES[0]} <|endoftext|> <tool> {LINES[1]}"
    before = ours.encode(text)
    copy = pickle.loads(pickle.dumps(ours))
    assert (copy.encode(text), copy.fingerprint, copy.eod) == (before, ours.fingerprint, ours.eod)


def test_without_torch_transformers_gives_the_same_tokenizer(tmp_path: Path) -> None:
    for number, make in enumerate((KINDS["unigram with marks"], harmony)):
        ours = Tokenizer(write(make(), tmp_path / str(number)))
        assert (theirs := received(ours.directory)) is not None
        assert (theirs.fingerprint, theirs.special_ids) == (ours.fingerprint, ours.special_ids)
        assert theirs.fast is not None
        assert ours.fast is not None
        assert theirs.fast.to_str() == ours.fast.to_str()
    assert received(tmp_path) is None, "no tokenizer there"


def edited(directory: Path, change: Any) -> str:
    """The fingerprint after `change` of the content of tokenizer.json."""
    content = json.loads((directory / "tokenizer.json").read_text())
    change(content)
    (directory / "tokenizer.json").write_text(json.dumps(content, indent=3))
    return Tokenizer(directory).fingerprint


def test_the_fingerprint_is_of_what_it_does_not_of_how_it_is_written(tmp_path: Path) -> None:
    directory = write(byte_level(), tmp_path / "t")
    first = Tokenizer(directory).fingerprint
    assert edited(directory, lambda content: content.update(truncation=None)) == first
    write_settings(directory, {"eos_token": {"content": "<|endoftext|>"}, "chat_template": "x", "model_max_length": 7})
    assert Tokenizer(directory).fingerprint == first
    write_settings(directory, {"eos_token": "<|endoftext|>"})
    AutoTokenizer.from_pretrained(directory).save_pretrained(tmp_path / "again")
    assert Tokenizer(tmp_path / "again").fingerprint == first
    seen = {first}
    write_settings(directory, {"eos_token": "<|im_end|>"})
    seen.add(Tokenizer(directory).fingerprint)
    write_settings(directory, {"eos_token": "<|endoftext|>"})
    assert Tokenizer(directory).fingerprint == first
    changes = [
        lambda content: content["model"]["merges"].reverse(),
        lambda content: content.update(normalizer={"type": "NFC"}),
        lambda content: content["added_tokens"].append({**content["added_tokens"][0], "id": 350, "content": "<new>"}),
        lambda content: content["pre_tokenizer"].update(add_prefix_space=True),
    ]
    for number, change in enumerate(changes, start=2):
        seen.add(edited(directory, change))
        assert len(seen) == number + 1


def test_a_score_counts(tmp_path: Path) -> None:
    directory = write(unigram(), tmp_path / "t")
    first = Tokenizer(directory).fingerprint
    assert edited(directory, lambda content: content["model"]["vocab"].__setitem__(5, ["▁its", -3.25])) != first


def test_ids_with_gaps_and_beyond_16_bits(tmp_path: Path) -> None:
    fast = json.loads(byte_level().to_str())
    names = sorted(fast["model"]["vocab"], key=fast["model"]["vocab"].get)
    for number, name in enumerate(names[-5:]):
        fast["model"]["vocab"][name] = 70_000 + 10 * number
    tokenizer = Tokenizer(write(Fast.from_str(json.dumps(fast)), tmp_path / "t"))
    assert tokenizer.vocab_size == 70_041
    assert token_dtype(tokenizer.vocab_size).itemsize == 4


def test_the_end_of_documents_may_be_named_in_any_of_three_files(tmp_path: Path) -> None:
    directory = write(byte_level(), tmp_path / "t")
    named = {"eos_token": {"content": "<|im_end|>", "lstrip": False}}
    write_settings(directory, {})
    write_settings(directory, named, "special_tokens_map.json")
    assert Tokenizer(directory).eod_token == "<|im_end|>"
    added = {"1": {"content": "<|im_end|>", "special": True}}  # a form with which transformers leaves that file unread
    write_settings(directory, {"added_tokens_decoder": added})
    assert Tokenizer(directory).eod_token == "<|im_end|>"
    write_settings(directory, named)
    assert Tokenizer(directory).eod_token == "<|im_end|>"


def test_tokens_that_were_added_beside_a_sentencepiece_model_count(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model(model_type="bpe", add_dummy_prefix=True))
    size = Tokenizer(tmp_path).vocab_size
    write_settings(tmp_path, {"<|im_start|>": size, "<|im_end|>": size + 1, "<tool>": size + 2}, "added_tokens.json")
    settings = {"tokenizer_class": "LlamaTokenizer", "eos_token": "<|im_end|>", "legacy": False}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = Tokenizer(tmp_path)
    assert (tokenizer.vocab_size, tokenizer.eod) == (size + 3, size + 1)
    text = "<|im_start|>user the<|im_end|> <tool> model"
    ids = tokenizer.encode(text)
    assert size + 2 in ids
    assert size + 1 not in ids
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert ids == theirs(text, add_special_tokens=False, split_special_tokens=True).input_ids


def test_a_tiktoken_list_beside_tokenizer_json_is_nothing(tmp_path: Path) -> None:
    directory = write(byte_level(), tmp_path / "t")
    before = Tokenizer(directory).fingerprint
    (directory / "tokenizer.model").write_text("IQ== 0\nIg== 1\n")
    assert Tokenizer(directory).fingerprint == before


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"
UNREADABLE = {
    "LFS pointer": ({"tokenizer.json": LFS}, "is a Git LFS pointer, not the file itself; fetch it by 'git lfs pull'"),
    "LFS pointer of a model": ({"tokenizer.model": LFS}, "is a Git LFS pointer"),
    "tiktoken list": (
        {"tokenizer.model": "IQ== 0\nIg== 1\n"},
        "is a tiktoken list: put the tokenizer.json of the same model beside",
    ),
    "no SentencePiece model": ({"tokenizer.model": "nothing"}, "tools/tokenizer.py export"),
    "newer": (
        {"tokenizer.json": json.dumps({"version": "1.0", "added_tokens": [], "model": {"type": "New", "vocab": {}}})},
        "pip install --upgrade tokenizers transformers",
    ),
    "cut": ({"tokenizer.json": '{"version": "1.0", "added'}, "tokenizer.json is damaged: download it again"),
    "nested": ({"tokenizer.json": "[" * 100_000}, "tokenizer.json is damaged"),
    "empty": ({"tokenizer.json": ""}, "is empty"),
    "settings of another kind": ({"tokenizer.json": None, "tokenizer_config.json": "[1]"}, "tokenizer_config.json"),
    "code": (
        {"tokenizer.json": None, "tokenizer_config.json": '{"auto_map": {"AutoTokenizer": ["x.X", null]}}'},
        "it has code of its own, which is not run here",
    ),
    "no eos": ({"tokenizer.json": None, "tokenizer_config.json": "{}"}, "names no eos_token"),
    "eos out of the vocabulary": (
        {"tokenizer.json": None, "tokenizer_config.json": '{"eos_token": "<nowhere>"}'},
        "names '<nowhere>' as eos_token, which is no token of the vocabulary",
    ),
    "nothing": ({}, r"no tokenizer here \(tokenizer.json or tokenizer.model\)"),
}


@pytest.mark.parametrize("kind", UNREADABLE)
def test_what_cannot_be_read_is_said_with_the_way_out(kind: str, tmp_path: Path) -> None:
    files, message = UNREADABLE[kind]
    for name, content in files.items():
        if content is None:
            byte_level().save(str(tmp_path / name))
        else:
            (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        Tokenizer(tmp_path)


def test_a_model_without_an_end_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model(model_type="bpe", eos_id=-1))
    with pytest.raises(DataError, match="names no eos_token"):
        Tokenizer(tmp_path)


def test_transformers_may_not_read_a_lone_model_otherwise_in_silence(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A Unigram model: transformers reads "<0x0A>" spelt out as the byte; LlamaTokenizer takes it for BPE."""
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model())
    with pytest.raises(DataError, match=r"otherwise than SentencePiece does.*tools/tokenizer.py export"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    Tokenizer(tmp_path)
    assert "Is LlamaTokenizer the right tokenizer_class?" in caplog.text


def test_a_text_that_only_the_end_of_documents_can_write_is_refused(tmp_path: Path) -> None:
    """The character 日 is unknown, and this tokenizer's unknown token is its end of documents."""
    fast = unigram()
    content = json.loads(fast.to_str())
    content["model"]["unk_id"] = 1
    directory = write(Fast.from_str(json.dumps(content)), tmp_path / "t", unk_token="<|endoftext|>")
    with pytest.raises(DataError, match=r"reads token 1 \('<\|endoftext\|>'\), which ends documents, out of"):
        Tokenizer(directory).encode("日")
    shutil.rmtree(directory)


def files_of_gpt2(directory: Path) -> str:
    byte_level().model.save(str(directory))
    return "GPT2Tokenizer"


def files_of_bert(directory: Path) -> str:
    word_piece().model.save(str(directory))
    return "BertTokenizer"


def files_of_t5(directory: Path) -> str:
    special = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1, "eos_piece": "<|endoftext|>"}
    options = {"add_dummy_prefix": True, "byte_fallback": False, "vocab_size": 120, "remove_extra_whitespaces": True}
    (directory / "spiece.model").write_bytes(sentencepiece_model(**options, **special))
    return "T5Tokenizer"


@pytest.mark.parametrize("files", [files_of_gpt2, files_of_bert, files_of_t5], ids=lambda files: files.__name__)
def test_a_tokenizer_of_other_files_is_one_everywhere(files: Any, tmp_path: Path) -> None:
    settings = {"tokenizer_class": files(tmp_path), "eos_token": "<|endoftext|>"}
    write_settings(tmp_path, settings)
    ours, theirs = Tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert ours.encode(LINES[0]) == theirs(LINES[0], add_special_tokens=False, split_special_tokens=True).input_ids
    assert ours.eod == theirs.eos_token_id
    assert has_tokenizer(tmp_path)
    (tmp_path / "copy").mkdir()
    assert copy_tokenizer(tmp_path, tmp_path / "copy")
    assert Tokenizer(tmp_path / "copy").fingerprint == ours.fingerprint
    write_settings(tmp_path, settings | {"eos_token": "<|nowhere|>"})
    with pytest.raises(DataError, match=r"names '<\|nowhere\|>' as eos_token, which is no token"):
        Tokenizer(tmp_path)
