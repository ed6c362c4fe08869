"""Gradients of a checkpoint in Megatron and of its export in transformers, compared by canonical name."""

import torch

from megatron_ext.model_io.logits import load_hugging_face


def gradients(checkpoint: str, exported: str) -> dict[str, float]:
    """Largest relative difference of each weight's gradient from transformers', on the same weights and tokens."""
    from megatron_ext.architectures.registry import architecture_for
    from megatron_ext.checkpoint.find import require_checkpoint
    from megatron_ext.checkpoint.load import load_shards
    from megatron_ext.config import Fp32Precision, ParallelConfig, RecomputeConfig, RuntimeConfig
    from megatron_ext.mcore.model import build_chunks
    from megatron_ext.mcore.state import model_shards, shards_of
    from megatron_ext.mcore.transformer_config import transformer_config
    from megatron_ext.model_io.checkpoint_model import read_model
    from megatron_ext.model_io.engine import MEGATRON, tasks_to_megatron
    from megatron_ext.runtime.process_groups import split_process_group
    from megatron_ext.runtime.seeds import seed_everything

    model, parallel = read_model(checkpoint), ParallelConfig()
    split_process_group(parallel, RuntimeConfig(device="cpu"))
    seed_everything(0)
    config = transformer_config(model, parallel, Fp32Precision(kind="fp32"), RecomputeConfig())
    (network,) = build_chunks(model, parallel, config, torch.device("cpu"))
    load_shards(require_checkpoint(checkpoint), model_shards([network]))
    tokens = torch.randint(0, model.vocab_size, (2, 33), generator=torch.Generator().manual_seed(3))
    inputs, labels = tokens[:, :-1], tokens[:, 1:]
    positions = torch.arange(inputs.shape[1]).expand_as(inputs)
    network(inputs, positions, None, labels=labels).mean().backward()

    reference = load_hugging_face(exported).train()
    logits = reference(inputs).logits
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()
    theirs = {name: p.grad if p.grad is not None else torch.zeros_like(p) for name, p in reference.named_parameters()}
    expected = {
        task.writes[MEGATRON]: task.make({role: theirs[name] for role, name in task.reads.items()})[MEGATRON]
        for task in tasks_to_megatron(architecture_for(model)[0].weights, model)
    }
    own = MegatronGradients(shards_of(network))
    return {
        name: float((own.whole(name, g.shape) - g).abs().max() / (g.abs().max() + 1e-12))
        for name, g in expected.items()
    }


class MegatronGradients:
    """Gradients of a one-process model by canonical name."""

    def __init__(self, pieces: dict) -> None:
        from megatron_ext.canonical.naming import stored_names

        flat = [
            (piece, param.grad.flatten()[piece.start : piece.start + piece.data.numel()])
            for param, ps in pieces.items()
            for piece in ps
        ]
        self.pieces = flat
        self.places = stored_names({piece.key: piece.global_shape for piece, _ in flat})

    def whole(self, name: str, shape: torch.Size) -> torch.Tensor:
        place = self.places[name]
        result = torch.zeros(shape)
        for piece, values in self.pieces:
            stacked = len(place.index)
            if piece.key == place.key and piece.offset[:stacked] == place.index:
                where = tuple(slice(o, o + s) for o, s in zip(piece.offset[stacked:], piece.data.shape, strict=True))
                result[where] = values.view(piece.data.shape)
        return result
