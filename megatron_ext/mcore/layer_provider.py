"""What the specs of layers (layer_specs.py) ask of a backend: the class of each part of a layer."""

from typing import Protocol


class LayerProvider(Protocol):
    """The parts of a layer in one library of kernels.

    Our own in place of megatron-core's BackendSpecProvider, which changes from version to version and knows neither
    latent attention nor our experts. A class is called as megatron-core's class for the same part is.
    """

    @property
    def fuses_norms(self) -> bool:
        """Whether `linear_after_norm` has the norm inside, so that none is built before it."""

    def norm(self, normalization: str) -> type:
        """Return the class of norms: RMSNorm or LayerNorm, as `model.normalization` says."""

    def column_parallel_linear(self) -> type:
        """Return the class of linear layers split over the TP group by output features."""

    def row_parallel_linear(self) -> type:
        """Return the class of linear layers split over the TP group by input features."""

    def linear_after_norm(self) -> type:
        """Return the class of the column-parallel linear layer that a norm goes before."""

    def core_attention(self) -> type:
        """Return the class of attention over queries, keys and values of one width."""

    def latent_core_attention(self) -> type:
        """Return the class of attention whose values have another width than queries and keys."""

    def feed_forward(self) -> type:
        """Return the class of a dense feed-forward network."""

    def shared_experts(self) -> type:
        """Return the class of shared experts without biases."""

    def grouped_experts(self) -> type:
        """Return the class of one rank's routed experts."""
