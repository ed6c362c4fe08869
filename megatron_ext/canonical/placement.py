"""Which ranks hold a tensor, and how much of it: pipeline stages, and the share of one rank of them."""

from megatron_ext.canonical.catalogue import EMBEDDING, CanonicalTensor
from megatron_ext.config import Layout, ModelConfig, ParallelConfig


def stage_of_layer(layer: int, model: ModelConfig, parallel: ParallelConfig) -> int:
    """The virtual pipeline stage of a layer: chunk c of stage p is p + c * stages."""
    chunks = parallel.pipeline_model_parallel_size * (parallel.virtual_pipeline_model_parallel_size or 1)
    place = layer + parallel.account_for_embedding_in_pipeline_split
    return place * chunks // (model.num_layers + parallel.counted_as_layers)


def stages_of(tensor: CanonicalTensor, model: ModelConfig, parallel: ParallelConfig) -> tuple[int, ...]:
    """The pipeline stages that hold `tensor`; a layer's virtual stage v is on stage v modulo their number."""
    pp = parallel.pipeline_model_parallel_size
    if tensor.layer is not None:
        return (stage_of_layer(tensor.layer, model, parallel) % pp,)
    if tensor.name == EMBEDDING:
        # A tied output layer is a copy of the embedding on the last stage.
        tied = not model.untie_embeddings_and_output_weights
        return (0, pp - 1) if tied and pp > 1 else (0,)
    return (0,) if tensor.name.startswith("embedding.") else (pp - 1,)


def elements_held(tensor: CanonicalTensor, layout: Layout) -> int:
    """Elements of `tensor` on each rank of a stage that holds it; of an expert's tensor the mean over the EP group."""
    split = tensor.tp_dimension is not None
    if tensor.is_expert:
        return tensor.size // (layout.ep * (layout.etp if split else 1))
    return tensor.size // (layout.tp if split else 1)
