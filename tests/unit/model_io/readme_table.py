"""The README's table of architectures: written from what was measured, and read again to be held to it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_ext.architectures.registry import ARCHITECTURES

BEGIN, END = "<!-- conversion table: written by pytest --write-conversion-table -->", "<!-- end of conversion table -->"
REMOTE = {a.hf_class for a in ARCHITECTURES if a.remote is not None}
OWN = "MegatronExtForCausalLM"


@dataclass(frozen=True)
class Proof:
    """What converting one model there and back showed."""

    relative: float
    """Largest difference of the logits over their scale."""
    argmax: float
    """Share of tokens where both sides predict the same."""
    bitwise: bool


def cells_of(hf_class: str, proof: Proof) -> list[str]:
    """One row."""
    export = "on request" if hf_class in REMOTE else "with its code" if hf_class == OWN else "yes"
    return [f"`{hf_class}`", "yes", export, f"{proof.relative:.0e}", "bit for bit" if proof.bitwise else "differs"]


def write_table(path: Path, rows: Mapping[str, Proof]) -> None:
    """Replace the table between the markers of `path`; a row that is still true stays as it is, its figure too."""
    there = read_table(path)
    lines = ["| Hugging Face class | import | export | logits: max abs difference / scale | round trip |"]
    lines.append("|---|---|---|---|---|")
    for hf_class, proof in rows.items():
        is_true = hf_class in there and not fault(there[hf_class], hf_class, proof)
        cells = there[hf_class] if is_true else cells_of(hf_class, proof)
        lines.append(f"| {' | '.join(cells)} |")
    before, _, rest = path.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    path.write_text(f"{before}{BEGIN}\n" + "\n".join(lines) + f"\n{END}{after}")


def read_table(path: Path) -> dict[str, list[str]]:
    """The cells of each row by its class."""
    table = path.read_text().partition(BEGIN)[2].partition(END)[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[3:]]
    return {cells[0].strip("`"): cells for cells in rows}


def fault(cells: list[str], hf_class: str, proof: Proof) -> str | None:
    """What a row says that was not measured; figures hold to within a factor of 10.

    They are fp32 rounding, which another processor's order of additions changes by a few times.
    """
    expected = cells_of(hf_class, proof)
    if cells[:3] + cells[4:] != expected[:3] + expected[4:]:
        return f"{hf_class}: the table says {cells}, measured was {expected}"
    if proof.relative >= 10 * float(cells[3]):
        return f"{hf_class}: the table says {cells[3]}, measured was {expected[3]}"
    return None
