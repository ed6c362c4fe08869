"""Damaged and hostile files: found by the manifest, and one clear error where there is none; never a traceback."""

import codecs
import json
import os
import pickle
import random
import shutil
import struct
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from megatron_ext.checkpoint.examine import examine
from megatron_ext.checkpoint.hf_directory import INDEX_FILE, HuggingFaceSource
from megatron_ext.checkpoint.run_file import read_run
from megatron_ext.checkpoint.state_file import RNG_FILE, read_random_state, read_state
from megatron_ext.checkpoint.streams import MegatronSource
from megatron_ext.checkpoint.tokenizer_files import tokenizer_files
from megatron_ext.checkpoint.torch_dist import METADATA_FILE, TorchDistReader
from megatron_ext.config import dump_yaml, read_yaml
from megatron_ext.errors import CheckpointError, ConversionError, MegatronExtError
from megatron_ext.manifest import MANIFEST_FILE, write_manifest
from megatron_ext.model_io.convert import convert
from megatron_ext.model_io.huggingface.model_card import replace_verification
from megatron_ext.model_io.logits import load_hugging_face
from megatron_ext.monitoring.report import read_phases, write_report
from tests.robustness.damage import damage, read_all
from tools import verify_checkpoint

# --- damage ---------------------------------------------------------------------------------------------------


def test_any_damage_to_any_file_is_found_by_its_checksum(either: Path, tmp_path: Path) -> None:
    examine(either)
    generator = random.Random(1)
    for file in sorted(path for path in either.iterdir() if path.is_file()):
        content = file.read_bytes()
        for _ in range(4):
            damage(file, generator)
            if file.name == MANIFEST_FILE and file.read_bytes().split() == content.split():
                continue
            with pytest.raises(MegatronExtError):
                examine(either)
            file.write_bytes(content)
    examine(either)


def test_damage_without_a_manifest_is_one_error_or_none(either: Path) -> None:
    (either / MANIFEST_FILE).unlink()
    generator = random.Random(2)
    files = sorted(path for path in either.iterdir() if path.suffix not in (".py", ".md"))
    for _ in range(60):
        file = generator.choice(files)
        content = file.read_bytes()
        damage(file, generator, within=400 if file.suffix in (".distcp", ".safetensors") else None)
        with suppress(MegatronExtError):
            read_all(either)
        file.write_bytes(content)
    read_all(either)


def test_every_cut_of_the_run_is_noticed_without_a_manifest(checkpoint: Path) -> None:
    (checkpoint / MANIFEST_FILE).unlink()
    file = checkpoint / "run.yaml"
    content = file.read_text()
    whole = read_run(checkpoint)
    for length in range(len(content)):
        file.write_text(content[:length])
        with pytest.raises(MegatronExtError):
            read_run(checkpoint)
    # A key taken out by hand: the rest would be another model.
    file.write_text("".join(line for line in content.splitlines(keepends=True) if "rotary_base" not in line))
    with pytest.raises(CheckpointError, match=r"run\.yaml: was changed or cut after it was written"):
        read_run(checkpoint)
    # Older versions wrote the same keys without a checksum.
    older = dump_yaml(whole)
    file.write_text(older)
    assert read_run(checkpoint) == whole
    for length in [*range(0, len(older), 61), len(older) - 1]:
        file.write_text(older[:length])
        with pytest.raises(MegatronExtError):
            read_run(checkpoint)


def test_a_damaged_newest_checkpoint_says_how_to_go_on(checkpoint: Path) -> None:
    newer = shutil.copytree(checkpoint, checkpoint.with_name("iter_0000007"))
    data = newer / "__0_0.distcp"
    data.write_bytes(data.read_bytes()[:-1])
    with pytest.raises(CheckpointError) as caught:
        MegatronSource(newer.parent)
    assert "__0_0.distcp: " in str(caught.value)
    assert f"go on from iter_0000000, the checkpoint before: mv {newer} {newer}.damaged" in str(caught.value)
    newer.rename(f"{newer}.damaged")
    assert MegatronSource(newer.parent).directory == checkpoint


@pytest.mark.parametrize("with_manifest", [True, False])
def test_damaged_random_states(with_manifest: bool, checkpoint: Path) -> None:
    (checkpoint / MANIFEST_FILE).unlink()
    file = checkpoint / RNG_FILE
    torch.save([{"torch": torch.get_rng_state(), "python": list(range(625))}], file)
    if with_manifest:
        write_manifest(checkpoint)
    content, generator = file.read_bytes(), random.Random(3)
    for _ in range(30):
        damage(file, generator, within=1500)
        with pytest.raises(CheckpointError, match=r"rng\.pt") if with_manifest else suppress(CheckpointError):
            read_random_state(checkpoint, 0)
        file.write_bytes(content)
    file.write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(CheckpointError, match=r"rng\.pt"):
        read_random_state(checkpoint, 0)


@pytest.mark.parametrize(
    "state", ["[]", "{}", "9", '{"iteration": "7"}', "[" * 5000, '{"iteration": ' + "1" * 5000 + "}", "\xff"]
)
def test_states_of_another_kind(state: str, checkpoint: Path) -> None:
    (checkpoint / MANIFEST_FILE).unlink()
    (checkpoint / "state.json").write_bytes(state.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"state\.json"):
        read_state(checkpoint)


def test_the_tool_says_what_is_whole_and_what_is_not(
    either: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def told(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["verify_checkpoint.py", str(either), *arguments])
        verify_checkpoint.main()
        return capsys.readouterr().out

    assert "MB, as they were written" in told()
    weights = next(iter([*either.glob("*.distcp"), *either.glob("*.safetensors")]))
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    with pytest.raises(CheckpointError, match=f"{weights.name}: the right size, but other content"):
        told()
    assert "listed as they are" in told("--write")
    (either / MANIFEST_FILE).unlink()
    with pytest.raises(CheckpointError, match=r"has no manifest\.json.*pass --write"):
        told()


# --- hostile files --------------------------------------------------------------------------------------------


def rewrite_metadata(checkpoint: Path, change: Callable[[Any], None]) -> None:
    (checkpoint / MANIFEST_FILE).unlink()
    content = pickle.loads((checkpoint / METADATA_FILE).read_bytes())
    change(content)
    (checkpoint / METADATA_FILE).write_bytes(pickle.dumps(content))


KEY = "decoder.layers.1.mlp.experts.experts.linear_fc2.weight"


def shift_a_chunk(content: Any) -> None:
    """The second expert lies over the first."""
    chunks = content.state_dict_metadata[KEY].chunks
    index = next(i for i, chunk in enumerate(chunks) if chunk.offsets[0] == 1)
    (old,) = (i for i in content.storage_data if i.fqn == KEY and tuple(i.offset) == tuple(chunks[index].offsets))
    chunks[index].offsets = next(chunk.offsets for chunk in chunks if chunk.offsets[0] == 0)
    content.storage_data.pop(old)


def drop_a_chunk(content: Any) -> None:
    content.state_dict_metadata[KEY].chunks.pop()


def share_bytes(content: Any) -> None:
    one, other = sorted((i for i in content.storage_data if i.fqn == KEY), key=lambda i: i.offset)[:2]
    content.storage_data[one].relative_path = content.storage_data[other].relative_path
    content.storage_data[one].offset = content.storage_data[other].offset


def name_a_file_outside(content: Any) -> None:
    for info in content.storage_data.values():
        info.relative_path = f"../{info.relative_path}"


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (shift_a_chunk, "overlap, so elements are missing"),
        (drop_a_chunk, r"hold \d+ of \d+ elements"),
        (share_bytes, "lie over each other"),
        (name_a_file_outside, "names '../__0_.*which is no file beside it"),
    ],
)
def test_metadata_that_lies(change: Callable[[Any], None], complaint: str, checkpoint: Path) -> None:
    rewrite_metadata(checkpoint, change)
    with pytest.raises(CheckpointError, match=complaint):
        TorchDistReader(checkpoint).read(KEY)


def test_pipes_and_links_in_a_checkpoint(checkpoint: Path) -> None:
    (checkpoint / MANIFEST_FILE).unlink()
    for name in ("__0_0.distcp", METADATA_FILE):
        file, outside = checkpoint / name, checkpoint.parent / "outside"
        file.rename(outside)
        file.symlink_to(outside)
        with pytest.raises(CheckpointError, match="link"):
            read_all(checkpoint)
        file.unlink()
        os.mkfifo(file)
        with pytest.raises(MegatronExtError):
            read_all(checkpoint)
        file.unlink()
        outside.rename(file)
    read_all(checkpoint)


def test_links_and_pipes_in_an_export(export: Path) -> None:
    """The hub's cache is made of links to files elsewhere."""
    shard = next(export.glob("*.safetensors"))
    blob = shard.rename(export.parent / "blob")
    shard.symlink_to(blob)
    read_all(export)
    shard.unlink()
    os.mkfifo(shard)
    for _ in range(2):
        with pytest.raises(ConversionError, match="not a regular file"):
            read_all(export)
        (export / MANIFEST_FILE).unlink(missing_ok=True)


@pytest.mark.parametrize("name", ["../blob", "/etc/passwd", 5, ["a"], None])
def test_an_index_names_files_beside_it(name: Any, export: Path) -> None:
    (export / MANIFEST_FILE).unlink()
    index = json.loads((export / INDEX_FILE).read_text())
    index["weight_map"]["model.norm.weight"] = name
    (export / INDEX_FILE).write_text(json.dumps(index))
    with pytest.raises(ConversionError, match="model.norm.weight is in .*: expected the name of a file beside"):
        HuggingFaceSource(export)


def safetensors_of(header: str, content: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header.encode() + content


ONE = '"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}'


@pytest.mark.parametrize(
    ("header", "size", "complaint"),
    [
        (f'{{{ONE}, "b": {{"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}}}', 4, "b begins at .*, but a ends"),
        (f'{{{ONE}, "b": {{"dtype": "F32", "shape": [1], "data_offsets": [8, 12]}}}}', 12, "b begins at .*, but a"),
        (f"{{{ONE}, {ONE}}}", 4, "the key 'a' is written twice"),
        ('{"a": {"dtype": "F32", "shape": [true], "data_offsets": [0, 4]}}', 4, "a is"),
        ('{"a": {"dtype": "F32", "shape": [0, 99999999999999999999], "data_offsets": [0, 0]}}', 0, "a is"),
        ('{"a": {"dtype": [], "shape": [1], "data_offsets": [0, 4]}}', 4, "a is"),
        ("[" * 5000, 0, "cannot be read as safetensors"),
    ],
)
def test_headers_that_lie(header: str, size: int, complaint: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(safetensors_of(header, bytes(size)))
    with pytest.raises(ConversionError, match=complaint):
        HuggingFaceSource(tmp_path)


def test_an_alias_bomb_is_refused_at_once(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 30)]
    (tmp_path / "run.yaml").write_text("\n".join(lines))
    with pytest.raises(MegatronExtError, match=r"run\.yaml: .*its aliases unfold to"):
        read_yaml(tmp_path / "run.yaml")
    (tmp_path / "run.yaml").write_text("a: &a [1, *a]")
    with pytest.raises(MegatronExtError, match="its aliases unfold to"):
        read_yaml(tmp_path / "run.yaml")
    (tmp_path / "run.yaml").write_text("a: &a {b: 1}\nc: [*a, *a]")
    assert read_yaml(tmp_path / "run.yaml") == {"a": {"b": 1}, "c": [{"b": 1}] * 2}


def test_code_of_a_tokenizer_that_no_parser_reads_is_carried_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["deep.Tokenizer", null]}}')
    (tmp_path / "deep.py").write_text(f"x = {'-' * 100_000}1\n")
    assert Path("deep.py") in tokenizer_files(tmp_path)


def test_a_card_in_another_encoding_keeps_what_people_wrote(tmp_path: Path) -> None:
    card = tmp_path / "README.md"
    card.write_bytes(b"# caf\xe9\n\n## Verification\n\nold\n\n## Notes\n\nna\xefve\n")
    replace_verification(tmp_path, ["logits: equal"])
    text = card.read_bytes()
    assert text.startswith(b"# caf\xe9\n\n## Verification\n\nCompared with megatron-core's model")
    assert b"logits: equal" in text
    assert b"old" not in text
    assert text.endswith(b"## Notes\n\nna\xefve\n")


def test_a_configuration_without_an_end_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").symlink_to("/dev/zero")
    with pytest.raises(MegatronExtError, match=r"run\.yaml: more than 16 MiB: no configuration is so long"):
        read_yaml(tmp_path / "run.yaml")


EVIL = (None, True, -1, 1.5, "x", "nan", [], {}, 10**30, float("nan"), float("inf"), "\ud800", [[]], "9" * 5000)


def test_broken_metrics_make_a_report_or_one_error(tmp_path: Path) -> None:
    layer = {"load": [0.25] * 4, "max_violation": 0.1, "entropy": 0.9}
    step = {"loss": 5.0, "consumed_tokens": 10, "tokens_per_second": 1.0, "tflops_per_device": 0.1, "time": 1e9}
    generator, refused = random.Random(4), 0
    for _ in range(100):
        records: list[dict[str, Any]] = [{"event": "start", "iteration": 0, "layout": {"DP": 2}, "run": {"a": 1}}]
        records += [{"iteration": n, **step, "moe": {"0": dict(layer), "1": dict(layer)}} for n in range(1, 5)]
        records.append({"iteration": 4, "validation_loss": 4.0})
        for _ in range(2):
            record = generator.choice(records)
            node = record if generator.random() < 0.6 or not record.get("moe") else record["moe"]["0"]
            if isinstance(node, dict):
                node[generator.choice(list(node))] = generator.choice(EVIL)
        file = tmp_path / "metrics.jsonl"
        file.write_text("".join(json.dumps(record) + "\n" for record in records))
        if generator.random() < 0.3:
            damage(file, generator)
        try:
            write_report(tmp_path / "report.html", "title", read_phases([f"x={file}"]), [], None)
        except MegatronExtError as error:
            refused += "metrics.jsonl" in str(error)
    print(f"{refused} of 100 refused")
    assert refused < 60, "a broken line does not cost the report"


# --- full disks and folders in the way ------------------------------------------------------------------------


def test_a_foreign_model_needs_no_manifest(tmp_path: Path) -> None:
    save_file({"x": torch.ones(3)}, tmp_path / "model.safetensors")
    assert torch.equal(HuggingFaceSource(tmp_path).read("x"), torch.ones(3))


def test_a_byte_order_mark_before_config_json(export: Path, tmp_path: Path) -> None:
    (export / MANIFEST_FILE).unlink()
    config = export / "config.json"
    config.write_bytes(codecs.BOM_UTF8 + config.read_bytes())
    assert convert(export, tmp_path / "back").written.tensors
    # transformers does not read it: who has the model loaded by it is told the way out.
    with pytest.raises(ConversionError, match="does not load it.* byte order mark; take that away: sed -i"):
        load_hugging_face(export)


@pytest.mark.parametrize("content", ["[1, 2]", "null", "{"])
def test_a_generation_config_of_another_kind_is_found_first(content: str, export: Path, tmp_path: Path) -> None:
    (export / MANIFEST_FILE).unlink()
    (export / "generation_config.json").write_text(content)
    for target in ("hf", "megatron"):
        with pytest.raises(ConversionError, match=rf"{export}/generation_config\.json: "):
            convert(export, tmp_path / target, to=target)  # type: ignore[arg-type]
    assert not (tmp_path / "megatron").exists()
