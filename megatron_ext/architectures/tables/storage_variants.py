"""How else the tensors of an architecture may be stored: fused, under older names, with masks beside them."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Stacked:
    """The experts of a layer as one tensor [experts, rows, ...], as newer writers may have them."""

    hf: str
    """Its name, with the hole `{layer}`."""
    parts: tuple[str, ...]
    """Names of an expert's tensors, with `{layer}` and `{expert}`: they share its rows equally, in this order."""
    written: bool = False
    """Whether exports have it so too, because the class reads nothing else; it then has one part."""
    packed: bool = False
    """Whether files may have it in MXFP4 (mxfp4.py), [experts, columns, rows], as `NAME_blocks` and `NAME_scales`."""


@dataclass(frozen=True)
class Alias:
    """Another name that files have for a tensor. Both may have the hole `{layer}`."""

    hf: str
    """The name that rules have."""
    other: str


@dataclass(frozen=True)
class Drop:
    """Tensors that only Hugging Face files have and that no logits depend on; they are not read."""

    hf: str
    """Their name, with the hole `{layer}` for any number, and `*` for anything at the end."""
    why: str
    beside: str | None = None
    """Only in layers that have this tensor too."""
