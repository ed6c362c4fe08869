"""A row in which rounding decides between two experts is told apart from a row that is wrong."""

import torch
from torch import Tensor

from megatron_ext.model_io.routing_ties import settle_ties

TOLERANCE = 1e-5
ROWS = torch.arange(1, 25).view(8, 3)
TIED = 5
"""The token for which both experts score alike, to the last bit."""


class TwoExperts(torch.nn.Module):
    """Embeddings through the expert that scores higher; position by position, and on to those that follow."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.embedding = torch.nn.Embedding.from_pretrained(torch.randn(32, 16, generator=generator))
        self.router = torch.randn(16, generator=generator)
        self.tie = float(self.embedding.weight[TIED].double() @ self.router.double())

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.embedding

    def forward(self, tokens: Tensor, use_cache: bool) -> "TwoExperts":
        hidden = self.embedding(tokens)
        first = hidden.double() @ self.router.double() > self.tie
        self.logits = (hidden * torch.where(first, 1.0, -1.0)[..., None]).cumsum(dim=1)
        return self


def computed(network: TwoExperts) -> Tensor:
    return network(ROWS, use_cache=False).logits


def flipped(network: TwoExperts) -> Tensor:
    """What it computes where the tie falls the other way."""
    network.tie -= 1e-12
    logits = computed(network)
    network.tie += 1e-12
    return logits


def test_a_tie_is_followed() -> None:
    network = TwoExperts()
    own, other = computed(network), flipped(network)
    rows = (own != other).any(dim=-1).any(dim=-1)
    assert rows.tolist() == [TIED in row for row in ROWS.tolist()]
    settled, ties = settle_ties(network, [ROWS], [other], [own], TOLERANCE)
    assert ties == 1
    assert torch.allclose(settled[0], other, rtol=0, atol=TOLERANCE * float(other.abs().max()))


def test_what_is_wrong_stays_wrong() -> None:
    network = TwoExperts()
    own, wrong = computed(network), flipped(network)
    wrong[1] += 1e-3  # the row of the tie
    settled, ties = settle_ties(network, [ROWS], [wrong], [own], TOLERANCE)
    assert ties == 0
    assert torch.equal(settled[0], own)


def test_many_rows_apart_are_no_ties() -> None:
    network = TwoExperts()
    own, other = computed(network), flipped(network)
    other[3:] *= 2
    assert settle_ties(network, [ROWS], [other], [own], TOLERANCE)[1] == 0


def test_no_numbers_are_no_ties() -> None:
    network = TwoExperts()
    own, other = computed(network), flipped(network)
    other[1, 2] = torch.nan
    assert settle_ties(network, [ROWS], [other], [own], TOLERANCE)[1] == 0
