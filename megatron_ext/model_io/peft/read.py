"""Reads a PEFT directory as adapters of ours: both layouts of experts, older shapes too, and nothing left over."""

#   E experts, R rank, I inputs, O outputs

import math
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_ext.canonical.adapters import AdapterPair, adapter_pairs
from megatron_ext.canonical.catalogue import EMBEDDING, OUTPUT
from megatron_ext.checkpoint.streams import TensorSource, TensorSpec
from megatron_ext.config import LoraConfig, LoraTarget, ModelConfig
from megatron_ext.config.adapters import Projection, projections
from megatron_ext.errors import ConversionError
from megatron_ext.model_io.adapters import Advance, stream_fingerprint, write_adapters
from megatron_ext.model_io.open import Checkpoint, open_checkpoint
from megatron_ext.model_io.peft.export import PREFIX
from megatron_ext.model_io.peft.files import CONFIG_FILE, read_directory
from megatron_ext.model_io.peft.fused import split
from megatron_ext.model_io.peft.names import Experts, HuggingFaceNames

_PLAIN: Mapping[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "use_dora": (False, None),
    "lora_bias": (False, None),
    "modules_to_save": (None, []),
    "layer_replication": (None, []),
    "trainable_token_indices": (None, [], {}),
    "use_qalora": (False, None),
    "init_lora_weights": (True, False, None, "gaussian"),
}
"""What fields of adapter_config.json may say; anything else computes something else, or has changed the base."""
_READ_OR_PAST = frozenset(
    "auto_mapping peft_version base_model_name_or_path revision task_type inference_mode r target_modules "
    "exclude_modules lora_alpha lora_dropout fan_in_fan_out use_rslora layers_to_transform layers_pattern rank_pattern "
    "alpha_pattern megatron_config megatron_core loftq_config eva_config corda_config lora_ga_config velora_config "
    "qalora_group_size runtime_config target_parameters ensure_weight_tying".split()
)
"""Fields that are read here, or that say how training went. Any other, of PEFT's next version too, may change what is
computed: it must say nothing."""


@dataclass(frozen=True)
class _Halves:
    """One adapter as it is in the file."""

    a: Tensor
    b: Tensor
    scale: float


class _Directory:
    """A PEFT directory; what is taken out of it is counted."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.config, tensors = read_directory(directory)
        self.tensors = {_key(name): tensor for name, tensor in tensors.items()}
        faults = [
            f"{key} is {self.config[key]!r}"
            for key, allowed in _PLAIN.items()
            if key in self.config and self.config[key] not in allowed
        ]
        others = self.config.keys() - _PLAIN.keys() - _READ_OR_PAST
        faults += [f"{key} is {self.config[key]!r}" for key in sorted(others) if self.config[key]]
        if faults:
            raise ConversionError(f"{directory / CONFIG_FILE}: {', '.join(faults)}: not what adapters of ours can be")
        self.left = set(self.tensors)

    def take(self, module: str, name: str, *, embedding: bool = False, experts: int = 1) -> _Halves | None:
        """The adapter at `module`, whose rank and alpha go by `name`, of each of its experts; None if there is none."""
        ends = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A.weight", "lora_B.weight")
        keys = [f"{module}.{end}" for end in ends]
        if not set(keys) <= self.left:
            return None
        self.left -= set(keys)
        a, b = (self.tensors[key].float() for key in keys)
        rank, scale = self._sizes(name)
        if len(a) != rank * experts:
            raise ConversionError(
                f"{self.directory}: {keys[0]} has {len(a)} rows, and {CONFIG_FILE} says r = {rank} for it"
            )
        return _Halves(a, b, scale)

    def take_any(self, modules: Sequence[str], *, embedding: bool) -> _Halves | None:
        """The adapter at the first of several names of a module that has one."""
        for module in modules:
            weight = f"{module}.weight"
            name = weight if weight in (self.config.get("target_parameters") or ()) else module
            if (one := self.take(module, name, embedding=embedding)) is not None:
                return one
        return None

    def _sizes(self, name: str) -> tuple[int, float]:
        """Rank and scale of the adapter that goes by `name`."""
        rank = _by_pattern(self.config.get("rank_pattern") or {}, name, self.config.get("r"))
        alpha = _by_pattern(self.config.get("alpha_pattern") or {}, name, self.config.get("lora_alpha"))
        if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float) or not math.isfinite(alpha):
            raise ConversionError(f"{self.directory / CONFIG_FILE}: r = {rank!r}, lora_alpha = {alpha!r}: no numbers")
        return rank, float(alpha) / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    def pass_over(self, module: str, base: TensorSource, weight: str, rows: int) -> None:
        """Leave out a copy of `weight` of the `base`, which PEFT writes beside adapters of either end of a model.

        Args:
            rows: of it that are tokens.
        """
        for key in (f"{module}.base_layer.weight", f"{module}.weight"):
            if key not in self.left:
                continue
            copy = self.tensors[key]
            own = base.read(weight)[:rows].to(copy.dtype)
            if copy.shape != own.shape or not torch.equal(copy, own):
                raise ConversionError(f"{self.directory}: {key} is another than that of the base, which is not adapted")
            self.left.remove(key)

    def swaps_parameters(self) -> bool:
        """Whether adapters of whole expert tensors were written by a PEFT that took their dimensions the other way."""
        version = str(self.config.get("peft_version") or "")
        numbers = re.match(r"(\d+)\.(\d+)", version)
        return numbers is not None and (int(numbers[1]), int(numbers[2])) < (0, 19)


def _key(name: str) -> str:
    """A tensor's name without what PEFT puts before it, and without the name of an adapter in memory."""
    return name.removeprefix(PREFIX).replace(".default.", ".").removesuffix(".default")


def _by_pattern(patterns: Mapping[str, Any], name: str, default: Any) -> Any:
    """What PEFT finds for a module or parameter: the first pattern that is its end."""
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", name)), default)


_TIED = (
    ". Its embedding is its output layer too, and has no adapters; for such give --base a model that has both "
    "(tools/convert.py {} TARGET --to hf --untie)"
)


class _Read:
    """The adapters of a directory as a stream under our names."""

    def __init__(self, model: ModelConfig, config: LoraConfig, halves: Mapping[str, Tensor]) -> None:
        self._halves = halves
        self.specs = {name: TensorSpec(tuple(tensor.shape), tensor.dtype) for name, tensor in halves.items()}

    def read(self, name: str) -> Tensor:
        return self._halves[name]


def import_peft(
    source: str | Path, target: str | Path, base: str | Path, dtype: torch.dtype, advance: Advance, *, force: bool
) -> int:
    """Write the PEFT directory `source`, of the model at `base`, as a checkpoint of adapters that a run continues.

    Args:
        base: its weights, a Hugging Face directory.
        dtype: in which a run will hold the base.

    Returns:
        How many adapters there are.

    Raises:
        ConversionError: it has something that adapters of ours are not; nothing that looks complete is left behind.
    """
    opened, directory = open_checkpoint(base), _Directory(Path(source))
    found = _found(opened, directory)
    if directory.left:
        some = ", ".join(sorted(directory.left)[:5])
        raise ConversionError(
            f"{source}: {len(directory.left)} tensors belong to no projection of the model: {some}"
            f"{'' if opened.model.untie_embeddings_and_output_weights else _TIED.format(base)}"
        )
    if not found:
        raise ConversionError(f"{source}: has no adapters of the model at {base}")
    config = _config_of(opened.model, found)
    halves = {}
    for pair in adapter_pairs(opened.model, config):
        one = found[pair.weight, pair.projection]
        halves[pair.a], halves[pair.b] = _padded(pair, one, opened.model)
    own = stream_fingerprint(opened.tensors, dtype, opened.model.vocab_size, advance)
    stream = _Read(opened.model, config, halves)
    write_adapters(target, stream, opened.model, config, opened.directory, own, tokenizer=opened.tokenizer, force=force)
    return len(halves) // 2


def _found(opened: Checkpoint, directory: _Directory) -> dict[tuple[str, str], _Halves]:
    """The adapters by weight and projection."""
    if opened.architecture is None:
        raise ConversionError(f"{opened.directory}: PEFT's names are those of a Hugging Face directory; give one")
    names = HuggingFaceNames(opened.architecture, opened.model)
    found: dict[tuple[str, str], _Halves] = {}
    # Tied weights have no halves: merging one would change the other end of the model.
    ours = "*" if opened.model.untie_embeddings_and_output_weights else "layers.*"
    for pair in adapter_pairs(opened.model, LoraConfig(targets=[LoraTarget(match=[ours], rank=1)])):
        if pair.weight in (EMBEDDING, OUTPUT):
            for module in names.modules(pair):
                directory.pass_over(module, opened.tensors, pair.weight, opened.model.vocab_size)
        one, together = directory.take_any(names.modules(pair), embedding=pair.is_embedding), names.fused(pair)
        if one is None:
            continue
        if together is None:
            found[pair.weight, pair.projection] = one
            continue
        for projection, (a, b) in split(one.a, one.b, together, opened.model).items():
            found[pair.weight, projection] = _Halves(a, b, one.scale)
    for layer, experts in names.experts().items():
        found |= _of_tensors(opened.model, layer, experts, directory)
    return found


def _of_tensors(
    model: ModelConfig, layer: int, experts: Experts, directory: _Directory
) -> dict[tuple[str, str], _Halves]:
    """The adapters of a layer's two tensors of experts, for each expert and projection."""
    hidden, width = model.hidden_size, model.expert_ffn_hidden_size
    targets = directory.config.get("target_parameters") or ()
    both = all(any(f"{experts.module}.{p}".endswith(t) for t in targets) for p in (experts.gate_up, experts.down))
    found: dict[tuple[str, str], _Halves] = {}
    inner = f"{experts.module}.base_layer" if both else experts.module
    block = f"decoder.layers.{layer}.mlp.experts"
    shapes = {experts.gate_up: (hidden, 2 * width), experts.down: (width, hidden)}
    for parameter, module in ((experts.gate_up, inner), (experts.down, experts.module)):
        one = directory.take(module, f"{experts.module}.{parameter}", experts=model.num_moe_experts or 1)
        if one is None:
            continue
        a_ERI, b_EOR = _by_expert(one, model.num_moe_experts or 1, shapes[parameter], directory)
        for expert, (a, b) in enumerate(zip(a_ERI, b_EOR, strict=True)):
            weight = f"{block}.{expert}.linear_fc{1 if parameter == experts.gate_up else 2}.weight"
            if parameter == experts.down:
                found[weight, "down"] = _Halves(a, b, one.scale)
            else:
                gate, up = _split(a_ERI, b_EOR, expert)
                found[weight, "gate"], found[weight, "up"] = _Halves(*gate, one.scale), _Halves(*up, one.scale)
    return found


def _by_expert(one: _Halves, experts: int, shape: tuple[int, int], directory: _Directory) -> tuple[Tensor, Tensor]:
    """A [E, R, I] and B [E, O, R] of tensors [E * R, I] and [O, R * E], whichever way their writer took dimensions."""
    inputs, outputs = shape
    found = one.a.shape[1], one.b.shape[0]
    rank = one.a.shape[0] // experts
    a_ERI = one.a.unflatten(0, (experts, rank))
    b_EOR = one.b.unflatten(1, (rank, experts)).permute(2, 0, 1)
    ambiguous = inputs == outputs
    if found == (inputs, outputs) and not (ambiguous and directory.swaps_parameters()):
        return a_ERI, b_EOR
    if found == (outputs, inputs):
        # x W with W [E, outputs, inputs] taken as [E, in, out]: the transposed product.
        return b_EOR.transpose(1, 2), a_ERI.transpose(1, 2)
    raise ConversionError(
        f"{directory.directory}: adapters of experts are {list(one.a.shape)} and {list(one.b.shape)}, which is neither "
        f"{inputs} to {outputs} nor {outputs} to {inputs}"
    )


def _split(a_ERI: Tensor, b_EOR: Tensor, expert: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Gate and up of one expert: of half the rank where all experts have a block for each, else of the whole rank."""
    half, width = a_ERI.shape[1] // 2, b_EOR.shape[1] // 2
    a, b = a_ERI[expert], b_EOR[expert]
    blocks = not bool(b_EOR[:, :width, half:].any()) and not bool(b_EOR[:, width:, :half].any())
    if a_ERI.shape[1] % 2 == 0 and blocks:
        return (a[:half], b[:width, :half]), (a[half:], b[width:, half:])
    return (a, b[:width]), (a, b[width:])


def _padded(pair: AdapterPair, one: _Halves, model: ModelConfig) -> tuple[Tensor, Tensor]:
    """Both halves with the padding of the vocabulary, zeros."""
    a, b = one.a, one.b
    padding = model.padded_vocab_size - model.vocab_size
    if pair.weight == EMBEDDING:
        a = torch.nn.functional.pad(a, (0, padding))
    if pair.weight == OUTPUT:
        b = torch.nn.functional.pad(b, (0, 0, 0, padding))
    return a.contiguous(), b.contiguous()


def _config_of(model: ModelConfig, found: Mapping[tuple[str, str], _Halves]) -> LoraConfig:
    """The section `adapters` that means these adapters, in as few targets as there are ranks and scales."""
    sizes: dict[Projection, set[tuple[int, float]]] = defaultdict(set)
    for projection in projections(model):
        for weight, name in found:
            if name == projection.name and _module_of(weight) == projection.module:
                one = found[weight, name]
                sizes[projection].add((one.a.shape[0], one.scale))
    targets: dict[tuple[int, float], list[Projection]] = defaultdict(list)
    for projection, own in sizes.items():
        if len(own) > 1:
            raise ConversionError(f"{projection.module}.{projection.name}: its experts have different ranks or alphas")
        targets[own.pop()].append(projection)
    return LoraConfig(
        targets=[
            LoraTarget(match=_patterns(model, those), rank=rank, alpha=scale * rank)
            for (rank, scale), those in targets.items()
        ]
    )


def _patterns(model: ModelConfig, those: Sequence[Projection]) -> list[str]:
    """What matches `those` projections and no others; one pattern where all layers have them that can."""
    layers = Counter((one.part, one.name) for one in projections(model))
    counts = Counter((one.part, one.name) for one in those)
    patterns = [
        f"layers.*.{one.part}.{one.name}"
        if one.layer is not None and counts[one.part, one.name] == layers[one.part, one.name]
        else f"{one.module}.{one.name}"
        for one in those
    ]
    return list(dict.fromkeys(patterns))


def _module_of(weight: str) -> str:
    """The module of a weight, without the number of an expert."""
    return re.sub(r"\.experts\.\d+\.", ".experts.", weight.removesuffix(".weight"))
