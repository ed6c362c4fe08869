"""A model with more tokens: a new row is the mean of its text's old ones, and all else is what it was."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_ext.canonical.catalogue import EMBEDDING, OUTPUT
from megatron_ext.checkpoint.find import checkpoint_name
from megatron_ext.checkpoint.run_file import read_run
from megatron_ext.checkpoint.streams import MegatronSource, TensorSpec
from megatron_ext.data.tokenizer import Tokenizer
from megatron_ext.data.tokenizer.probe import HARD_TEXTS
from megatron_ext.errors import ConversionError, DataError
from megatron_ext.model_io import extend as module
from megatron_ext.model_io.convert import convert
from megatron_ext.model_io.extend import ExtendedRows, extend
from megatron_ext.model_io.open import open_checkpoint
from megatron_ext.model_io.options import ExtendOptions
from megatron_ext.testing.tiny import tiny_model
from tests.support.checkpoints import write_checkpoint
from tests.unit.data.tokenizers import (
    byte_level,
    sentencepiece_model,
    unigram,
    with_marks,
    word_piece,
    write,
    write_settings,
)

NEW = ["<|im_start|>", "<tool_call>"]


class Rows:
    """Tensors that are there."""

    def __init__(self, **tensors: Tensor) -> None:
        self._tensors = tensors
        self.specs = {name: TensorSpec(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}

    def read(self, name: str) -> Tensor:
        return self._tensors[name]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_new_row_is_the_mean_of_its_pieces(dtype: torch.dtype) -> None:
    table = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 2.0], [9.0, 9.0]], dtype=dtype)  # the last is padding
    before = tiny_model(vocab_size=3, make_vocab_size_divisible_by=2)
    source = Rows(**{EMBEDDING: table, OUTPUT: 2 * table, "other": torch.ones(3)})
    made = ExtendedRows(source, before, replace(before, vocab_size=5), {3: [0, 2], 4: [1]})
    expected = torch.tensor([[1, 0], [0, 1], [2, 2], [1.5, 1.0], [0, 1], [0, 0]], dtype=dtype)
    assert torch.equal(made.read(EMBEDDING), expected)
    assert torch.equal(made.read(OUTPUT), 2 * expected)
    assert made.specs[EMBEDDING] == TensorSpec((6, 2), dtype)
    assert made.read("other") is source.read("other")
    with pytest.raises(ConversionError, match=r"makes token 3 .*no row for \(vocab_size 3\)"):
        ExtendedRows(source, before, before, {4: [0, 3]})


def megatron(folder: Path, tokenizer: Path | None = None, **model: Any) -> Path:
    """A Megatron checkpoint of a run, with a tokenizer of 350 tokens."""
    directory = tokenizer or write(byte_level(), folder / "tok")
    run = {"data": {"tokenizer": str(directory), "train": [{"path": "DATA/train"}]}}
    made = write_checkpoint(folder / "model", tiny_model(**{"vocab_size": 350, **model}), run=run)
    shutil.copytree(directory, made / checkpoint_name(0) / "tokenizer", dirs_exist_ok=True)
    return made


def options(source: Path, target: Path, **changes: Any) -> ExtendOptions:
    return ExtendOptions(source=str(source), target=str(target), **{"tokens": NEW, **changes})


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_megatron_checkpoint_is_whole_and_computes_what_it_did(tied: bool, tmp_path: Path) -> None:
    source = megatron(tmp_path, untie_embeddings_and_output_weights=not tied)
    made = extend(options(source, tmp_path / "more", special=True))
    assert made.added.ids == {NEW[0]: 350, NEW[1]: 351}
    assert "max |d|" in "\n".join(made.lines)
    opened, old = open_checkpoint(tmp_path / "more"), MegatronSource(source)
    assert opened.model == replace(open_checkpoint(source).model, vocab_size=352)
    assert opened.tokenizer is not None
    tokenizer, before = Tokenizer(opened.tokenizer), Tokenizer(tmp_path / "tok")
    assert tokenizer.vocab_size == 352
    assert (EMBEDDING in opened.tensors.specs, OUTPUT in opened.tensors.specs) == (True, not tied)
    for name in opened.tensors.specs:
        new, known = opened.tensors.read(name), old.read(name)
        if name in (EMBEDDING, OUTPUT):
            for number, token in enumerate(NEW, start=350):
                assert torch.allclose(new[number], known[before.encode(token)].mean(0), atol=1e-7)
            new, known = new[:350], known[:350]
        assert torch.equal(new, known)
    run = read_run(opened.directory)
    assert Path(run["data"]["tokenizer"]) == opened.tokenizer
    recipe = (tmp_path / "more.yaml").read_text()
    assert "vocab_size: 352" in recipe
    assert str(opened.tokenizer) in recipe


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_hugging_face_directory_loads_and_generates_with_them(tied: bool, tmp_path: Path) -> None:
    convert(megatron(tmp_path, untie_embeddings_and_output_weights=not tied), tmp_path / "hf")
    made = extend(options(tmp_path / "hf", tmp_path / "more"))
    assert made.model is not None
    network = AutoModelForCausalLM.from_pretrained(tmp_path / "more")
    before = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "more")
    assert network.config.vocab_size == 352 == len(tokenizer)
    assert network.config.tie_word_embeddings == tied
    ids = tokenizer("the model<tool_call>", add_special_tokens=False, return_tensors="pt").input_ids
    assert ids[0, -1] == 351
    pieces = AutoTokenizer.from_pretrained(tmp_path / "hf")("<tool_call>", add_special_tokens=False).input_ids
    for table in (network.get_input_embeddings().weight, network.get_output_embeddings().weight):
        assert torch.allclose(table[351], table[pieces].mean(0), atol=1e-7)
    with torch.no_grad():
        logits, known = network(ids).logits, before(ids[:, :-1]).logits
    assert torch.allclose(logits[:, :-1, :350], known, atol=1e-5)
    assert torch.isfinite(logits).all()
    convert(tmp_path / "more", tmp_path / "back")
    assert open_checkpoint(tmp_path / "back").model.vocab_size == 352


def test_rows_that_a_model_had_for_no_token_are_taken_first(tmp_path: Path) -> None:
    source = megatron(tmp_path, vocab_size=351)
    made = extend(options(source, tmp_path / "more"))
    assert made.model is not None
    assert made.model.vocab_size == 352
    old, new = MegatronSource(source).read(EMBEDDING), MegatronSource(tmp_path / "more").read(EMBEDDING)
    assert not torch.equal(old[350], new[350])


KINDS = {
    "byte-level BPE": lambda folder: write(byte_level(), folder),
    "with marks": lambda folder: write(with_marks(byte_level()), folder),
    "unigram": lambda folder: write(with_marks(unigram()), folder),
    "WordPiece": lambda folder: write(word_piece(), folder),
    "SentencePiece": lambda folder: lone_model(folder),
}


def lone_model(folder: Path) -> Path:
    """As Llama 2, with tokens that were added to it before."""
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(sentencepiece_model(model_type="bpe", add_dummy_prefix=True))
    size = Tokenizer(folder).vocab_size
    write_settings(folder, {"<tool>": size}, "added_tokens.json")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer", "legacy": False}))
    return folder


@pytest.mark.parametrize("special", [False, True], ids=["text", "special"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_tokenizer_alone_of_any_kind(kind: str, special: bool, tmp_path: Path) -> None:
    directory = KINDS[kind](tmp_path / "t")
    before = Tokenizer(directory)
    (tmp_path / "names").write_text(f"{NEW[1]}\n")
    o = options(directory, tmp_path / "more", tokens=NEW[:1], tokens_file=str(tmp_path / "names"), special=special)
    made = extend(o)
    assert made.model is None
    after = Tokenizer(tmp_path / "more")
    size = before.vocab_size
    assert made.added.ids == {NEW[0]: size, NEW[1]: size + 1}
    assert (after.vocab_size, after.eod) == (size + 2, before.eod)
    assert (size in after.encode(f"the {NEW[0]} model")) != special
    for text in HARD_TEXTS:
        if NEW[0] not in text:
            assert after.encode(text) == before.encode(text)
    with pytest.raises(ConversionError, match="exists"):
        extend(o)
    with pytest.raises(DataError, match=f"is token {size} already"):
        extend(options(tmp_path / "more", tmp_path / "again", tokens=NEW[:1]))
    assert not (tmp_path / "again").exists()


def test_what_cannot_be_extended_is_said_and_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = megatron(tmp_path)
    for tokens, message in {
        (): "no tokens to add",
        (" ",): "empty, white space",
        ("\udcff",): "not UTF-8",
        ("<a>", "<a>"): "named twice",
        ("the",): "'the' is token",
    }.items():
        with pytest.raises(DataError, match=message):
            extend(options(source, tmp_path / "out", tokens=list(tokens)))
    (tmp_path / "nothing").mkdir()
    with pytest.raises(ConversionError, match="nowhere: no such folder; give that of a model or of a tokenizer"):
        extend(options(tmp_path / "nowhere", tmp_path / "out"))
    with pytest.raises(ConversionError, match="neither a model"):
        extend(options(tmp_path / "nothing", tmp_path / "out"))
    bare = write_checkpoint(tmp_path / "bare", tiny_model())
    with pytest.raises(ConversionError, match="carries no tokenizer to add tokens to; pass --tokenizer"):
        extend(options(bare, tmp_path / "out"))
    with pytest.raises(ConversionError, match="it is another model's"):
        extend(options(bare, tmp_path / "out", tokenizer=str(write(byte_level(), tmp_path / "larger"))))
    monkeypatch.setattr(module, "_same", lambda a, b: a.shape[0] < 350)
    with pytest.raises(ConversionError, match=r"embedding.*read again, is not what was written"):
        extend(options(source, tmp_path / "out"))
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith("out") and path.is_file()]
    assert not list(tmp_path.glob("out/*"))


def test_a_text_of_new_tokens_is_not_where_logits_are_compared(tmp_path: Path) -> None:
    """A model that computes otherwise, as with damaged rows, is not written."""
    source = megatron(tmp_path)
    rows = ExtendedRows.read

    def scaled(self: ExtendedRows, name: str) -> Tensor:
        return rows(self, name) * (2 if name == OUTPUT else 1)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(ExtendedRows, "read", scaled)
        with pytest.raises(ConversionError, match="it computes otherwise than before"):
            extend(options(source, tmp_path / "out"))
        extend(options(source, tmp_path / "unseen", logits=False))
