"""The README's way from a folder of text in three languages to a run of three stages, as far as before it trains."""

import glob
import json
import random
import re
import shlex
from pathlib import Path

import pytest

from tests.support.commands import command
from tests.support.workspace import ROOT

RUN = "examples/three_languages/run.yaml"
WORDS = {
    "en": "the quick brown fox sees a small house by the river and walks on through the night".split(),
    "ja": "吾輩は 猫である。 名前は まだ無い。 東京へ 行く 人が 多い、 夜の 川を 見る。".split(),
    "hi": "सूरज पूरब में निकलता है और रात को नदी के पास घर दिखता है".split(),
}


def commands() -> list[str]:
    """What the README says to do."""
    (block,) = re.findall(
        rf"```\n(python tools/tokenizer\.py train [^`]*{RUN} --check[^`]*)```", (ROOT / "README.md").read_text()
    )
    return [re.split(r"  +#", line)[0].rstrip() for line in block.strip().splitlines()]


def test_the_example_says_what_the_readme_says() -> None:
    head = [line[4:] for line in (ROOT / RUN).read_text().splitlines() if line.startswith("#   ")]
    assert head == commands()
    assert len(head) == 5


def test_from_a_folder_of_text_to_the_plan_of_three_stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("tools", "examples"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "corpus").mkdir()
    for language, words in WORDS.items():
        draw = random.Random(language)
        rows = [{"text": f"{' '.join(draw.choices(words, k=draw.randint(30, 90)))} {n}"} for n in range(300)]
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        (tmp_path / "corpus" / f"{language}_1.jsonl").write_text("\n".join(lines))
    train, prepare, check, *_ = commands()
    ((languages, prepare),) = re.findall(r"for l in (.*); do (.*); done", prepare)
    # There is too little text for that many pieces.
    lines = [train.replace("8192", "360"), *(re.sub(r"\$l|\${l}", one, prepare) for one in languages.split()), check]
    for line in lines:
        _, tool, *words = shlex.split(line)
        process = command(tool, *(one for word in words for one in (glob.glob(word) if "*" in word else [word])))
        assert process.returncode == 0, process.stderr
    said = [" ".join(line.split()[1:]) for line in process.stdout.splitlines() if line.startswith("data ")]
    stages = {line.split()[0]: line.partition(" ")[2] for line in said if " lr " in line}
    assert stages["english"] == "40 steps 81.9K tokens 16 x 128 lr 2.5e-05 to 0.001"
    assert stages["languages"] == "60 steps 123K tokens 16 x 128 lr 0.001 to 0.001"
    assert re.fullmatch(r"49 steps 50\.2K tokens 8 x 128 lr [\d.]+ to 0\.0001", stages["anneal"])
    assert [line.split()[-1] for line in said if re.match("en .*%", line)] == ["80.0%", "30.0%", "40.1%"]
