"""Our model with the weights of a transformers model, and what both give, under Megatron's names."""




@dataclass(frozen=True)
class InMemory:
    """Tensors by name, as a source."""

    tensors: Tensors

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        return {name: TensorSpec(tuple(x.shape), x.dtype) for name, x in self.tensors.items()}

    def read(self, name: str) -> Tensor:
        return self.tensors[name]

    def read_box(self, name: str, offset: tuple[int, ...], size: tuple[int, ...]) -> Tensor:
        return self.tensors[name][tuple(slice(o, o + n) for o, n in zip(offset, size, strict=True))]


def canonical(tensors: Tensors, architecture: Architecture, model: ModelConfig) -> Tensors:
    """Weights, or gradients, of a transformers model under Megatron's names."""
    source = NormalizedHfSource(InMemory(tensors), architecture, model)
    return {
        task.writes[MEGATRON]: task.make({role: source.read(name) for role, name in task.reads.items()})[MEGATRON]
        for task in tasks_to_megatron(architecture.weights, model)
    }


def our_network(model: ModelConfig, precision: Precision, weights: Tensors) -> Any:
    """Our model on one process, with `weights` by canonical name."""
    config = transformer_config(model, ParallelConfig(), precision, RecomputeConfig())
    (network,) = build_chunks(model, ParallelConfig(), config, torch.device("cpu"))
    shapes = model_shapes(model)
    assert {name: tuple(tensor.shape) for name, tensor in weights.items()} == shapes
    places = {}
    for name, (place, shape) in storage_plan(shapes).items():
        places.setdefault(place.key, torch.empty(shape))[place.index].copy_(weights[name])
    for pieces in shards_of(network).values():
        for piece in pieces:
            shard = tuple(slice(o, o + s) for o, s in zip(piece.offset, piece.shard_shape, strict=True))
            piece.data.copy_(places[piece.key][shard].view(piece.data.shape))
    return network


def gradients_by_name(network: Any, model: ModelConfig) -> Tensors:
    """The gradient of each weight, by canonical name."""
    places: Tensors = {}
    for weight, pieces in shards_of(network).items():
        for piece in pieces:
            shard = tuple(slice(o, o + s) for o, s in zip(piece.offset, piece.shard_shape, strict=True))
            grad = torch.zeros_like(weight) if weight.grad is None else weight.grad  # a buffer has none
            part = grad.flatten()[piece.start : piece.start + piece.data.numel()]
            places.setdefault(piece.key, torch.zeros(piece.global_shape))[shard] = part.view(piece.shard_shape).float()
    plan = storage_plan(model_shapes(model))
    return {name: places[place.key][place.index] for name, (place, _) in plan.items()}


def relative(a: Tensor, b: Tensor) -> float:
    scale = b.abs().max()
    return float((a - b).abs().max() / scale) if scale else float((a - b).abs().max())


def build(model: ModelConfig, parallel: ParallelConfig, seed: int = 1) -> list:
    split_process_group(parallel, RuntimeConfig(device="cpu"))
    seed_everything(0)
    config = transformer_config(model, parallel, FP32, RecomputeConfig())
    chunks = build_chunks(model, parallel, config, torch.device("cpu"))
    initialize_weights(model, list(chunks), seed)
    return list(chunks)
