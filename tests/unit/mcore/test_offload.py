"""Activations in the host's memory: the same bits, only what should go, each once.

In layouts: distributed/test_parity.py. How many bytes device and host then hold: planning/test_peak_memory.py.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_ext.config import Bf16Precision, ParallelConfig, RecomputeConfig
from megatron_ext.mcore import layer as layers
from megatron_ext.mcore.offload import HostCopies, Offload, Pair
from megatron_ext.proving.parity import Cell, Trajectory, build_cell, train_cell
from megatron_ext.testing.pool import GlooPool
from megatron_ext.testing.tiny import tiny_model

CPU = torch.device("cpu")


class LateCopies(HostCopies):
    """A device whose copies are as late as they may be: none is made before computing waits for it.

    What is to be copied from the device must be there until then, and what is copied to holds no number. The host's
    memory may be let go before: torch gives it to nobody while copies from it are under way.
    """

    def __init__(self) -> None:
        super().__init__()
        self.queue: list[tuple[int, Tensor, Callable[[], torch.UntypedStorage | None]]] = []
        self.of_host = weakref.WeakSet[torch.UntypedStorage]()
        self.started = 0

    def memory(self, like: Tensor) -> Tensor:
        there = super().memory(like)
        self.of_host.add(there.untyped_storage())
        return there

    def start(self, pairs: Any, device: torch.device) -> int:
        for target, source in pairs:
            target.fill_(0xFF)
            storage = source.untyped_storage()
            reference = partial(identity, storage) if storage in self.of_host else weakref.ref(storage)
            self.queue.append((self.started, target, reference))
        self.started += 1
        return self.started

    def wait(self, copied: Any, device: torch.device) -> None:
        while self.queue and self.queue[0][0] < copied:
            _, target, reference = self.queue.pop(0)
            source = reference()
            assert source is not None, "freed before it was copied"
            target.untyped_storage().copy_(source)


def identity(storage: torch.UntypedStorage) -> torch.UntypedStorage:
    return storage


class Layer(torch.nn.Module):
    """Keeps its input, three activations and views of them; its weights as they are, transposed and detached."""

    def __init__(self, shared: Tensor, rows: int) -> None:
        super().__init__()
        # Two weights in one buffer, as megatron-core's data parallelism has all of a model.
        self.first, self.second = (torch.nn.Parameter(part.view(8, 8)) for part in shared.view(rows, 8).chunk(2))
        self.register_buffer("table", torch.linspace(0.5, 1.5, 8).expand(6, 8).contiguous())

    def forward(self, x: Tensor) -> Tensor:
        h = F.linear(x, self.first) * self.table
        return x + (h.exp() * h[:, :4].sum()) @ self.second.t() + (h.t() @ h).sum(dim=0)


def build(count: int = 3) -> tuple[list[Layer], Tensor]:
    generator = torch.Generator().manual_seed(0)
    blocks = [Layer(torch.randn(128, generator=generator) / 8, 16) for _ in range(count)]
    return blocks, torch.randn(6, 8, generator=generator)


def through(offload: Offload | None, blocks: list[Layer], x: Tensor, *, moved: int = 99) -> Tensor:
    """All blocks, of which the first `moved` keep what they keep in the host's memory."""
    hidden = x.requires_grad_()
    for number, block in enumerate(blocks):
        if offload is None:
            hidden = block(hidden)
            continue
        with offload.around(block, hidden, is_first=number == 0, moves=number < moved) as before:
            output = block(hidden)
        offload.comes_before(before, output)
        hidden = output
    return hidden.square().sum()


def gradients(blocks: list[Layer], x: Tensor) -> list[Tensor]:
    found = [tensor.grad for tensor in (x, *(p for block in blocks for p in block.parameters()))]
    for tensor in (x, *(p for block in blocks for p in block.parameters())):
        tensor.grad = None
    return [grad for grad in found if grad is not None]


@pytest.mark.parametrize("moved", [1, 2, 3], ids="{} of three".format)
def test_gradients_have_the_same_bits_however_late_copies_are(moved: int) -> None:
    blocks, x = build()
    through(None, blocks, x).backward()
    expected = gradients(blocks, x)
    assert len(expected) == 7
    late = LateCopies()
    for copies in (HostCopies(), late):
        offload = Offload(1, copies)
        for _ in range(2):
            through(offload, blocks, x, moved=moved).backward()
            assert all(torch.equal(one, other) for one, other in zip(gradients(blocks, x), expected, strict=True))
            assert (offload.held, offload.most_held > 0) == (0, True)
    assert late.started


def test_several_micro_batches_in_flight_keep_their_own() -> None:
    """Three forward passes before the first backward pass, as a pipeline stage has them, and validation between."""
    blocks, x = build()
    inputs = [x / (1 + number) for number in range(3)]
    expected = []
    for one in inputs:
        through(None, blocks, one).backward()
        expected.append(gradients(blocks, one))
    offload = Offload(1, LateCopies())
    losses = [through(offload, blocks, one) for one in inputs]
    each = offload.held / 3
    with torch.no_grad():
        through(offload, blocks, x.detach().clone())
    for number, (one, loss) in enumerate(zip(inputs, losses, strict=True)):
        loss.backward()
        assert all(torch.equal(a, b) for a, b in zip(gradients(blocks, one), expected[number], strict=True))
        assert offload.held == (2 - number) * each


def test_only_activations_go_and_each_once() -> None:
    """Neither weights, whichever view of them is kept, nor buffers, nor what the schedule keeps, nor what is small."""
    blocks, x = build(2)
    offload = Offload(1)
    loss = through(offload, blocks, x)
    # Of each layer h before and after the table, h.exp(), the sum and its product; of the second its input, too.
    activation, number = 6 * 8 * 4, 4
    first = 3 * activation + number
    assert offload.held == 2 * first + activation
    del loss
    assert offload.held == 0  # no backward pass: what nobody can ask for any more is let go
    offload = Offload(number + 1)
    loss = through(offload, blocks, x)
    assert offload.held == 2 * (first - number) + activation
    loss.backward(retain_graph=True)
    once = gradients(blocks, x)
    loss.backward()
    assert all(torch.equal(one, other) for one, other in zip(gradients(blocks, x), once, strict=True))


def changed_in_the_layer(h: Tensor) -> Tensor:
    kept = h.exp()
    return kept.mul_(2)


def changed_in_the_next_layer(h: Tensor) -> Tensor:
    return h.exp()


@pytest.mark.parametrize("first", [changed_in_the_layer, changed_in_the_next_layer])
def test_what_is_changed_on_its_way_is_refused(first: Callable[[Tensor], Tensor]) -> None:
    """Autograd finds such changes of what it keeps, but not of what hooks keep for it."""
    offload, nothing = Offload(1, LateCopies()), torch.nn.Module()
    x = torch.linspace(0.1, 1, 8).requires_grad_()

    def forward() -> Tensor:
        with offload.around(nothing, x, is_first=True, moves=True):
            hidden = first(x)
        with offload.around(nothing, hidden, is_first=False, moves=True) as before:
            output = hidden.mul_(3) if first is changed_in_the_next_layer else hidden.clone()
        offload.comes_before(before, output)
        return output.sum()

    with pytest.raises(RuntimeError, match=r"a tensor of shape \(8,\).*changed in place \(version 1, kept as 0\)"):
        forward()


def test_what_is_changed_before_it_goes_is_refused_in_the_backward_pass_too() -> None:
    offload = Offload(1)
    x = torch.linspace(0.1, 1, 8).requires_grad_()
    with offload.around(torch.nn.Module(), x, is_first=True, moves=True):
        hidden = x.exp()
    output = hidden.sum()
    hidden.detach().mul_(2)
    with pytest.raises(RuntimeError, match="changed in place"):
        output.backward()


def test_a_device_holds_two_layers_at_a_time() -> None:
    blocks, x = build(6)
    offload = Offload(1)
    there: list[int] = []

    def here(*_: Any) -> None:
        there.append(offload.held)

    loss = through(offload, blocks, x)
    most = offload.most_held
    for block in blocks:
        block.second.register_hook(here)
    loss.backward()
    # The last layer had not gone; each layer's backward pass finds its own and that of the layer before come back.
    each = (most - there[0]) / 2
    assert [round((most - held) / each) for held in there] == [2, 3, 4, 5, 6, 6]


def trained(cell: Cell) -> tuple[Trajectory, int | None]:
    """Losses and gradient norms of `cell`, and the bytes that the host held at most."""
    trainable, groups = build_cell(cell)
    trajectory = train_cell(cell, trainable, groups)
    offload = layers.offload_of(trainable.chunks)
    trainable.release()
    assert offload is None or offload.held == 0
    return trajectory, offload and offload.most_held


def trained_late(cell: Cell) -> tuple[Trajectory, int | None]:
    """The same with copies that are as late as they may be."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layers, "Offload", lambda smallest: Offload(smallest, LateCopies()))
        return trained(cell)


@pytest.mark.parametrize("moe", [False, True], ids=["dense", "MoE"])
def test_models_train_to_the_same_bits(moe: bool, pool: GlooPool) -> None:
    """Also where a norm's readers keep its input, which is in the host's memory, and compute it once more."""
    model = tiny_model(moe=moe)
    again = RecomputeConfig(granularity="selective", modules=["layernorm"])
    cell = Cell(model, ParallelConfig(), Bf16Precision(kind="bf16"), again, steps=2)
    ((expected, nothing),) = pool.run(1, trained, cell)
    moved = {count: replace(again, offload_layers=count, offload_min_bytes=1) for count in (3, model.num_layers)}
    ((found, some),) = pool.run(1, trained_late, replace(cell, recompute=moved[3]))
    ((again_found, all_of_it),) = pool.run(1, trained, replace(cell, recompute=moved[model.num_layers]))
    assert found == again_found == expected
    print(f"{some:,} and {all_of_it:,} bytes of the host")
    assert nothing is None
    assert some is not None
    assert all_of_it is not None
    assert 0 < some < all_of_it


@contextmanager
def recorded_cuda(calls: list[str]) -> Iterator[None]:
    """torch.cuda's streams as what was asked of them: names and order, which no machine without a GPU can follow."""

    class Stream:
        def __init__(self, name: Any) -> None:
            self.name = name if isinstance(name, str) else "side"

        def wait_stream(self, other: "Stream") -> None:
            calls.append(f"{self.name} waits for {other.name}")

        def wait_event(self, event: str) -> None:
            calls.append(f"{self.name} waits for {event}")

        def record_event(self) -> str:
            calls.append(f"event of {self.name}")
            return f"event of {self.name}"

    @contextmanager
    def within(stream: Stream) -> Iterator[None]:
        calls.append(f"on {stream.name}:")
        yield
        calls.append("on main:")

    fake = SimpleNamespace(Stream=Stream, current_stream=lambda device=None: Stream("main"), stream=within)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "cuda", fake)
        yield


def test_copies_of_a_gpu_run_beside_it_in_order() -> None:
    calls: list[str] = []

    class Bytes:
        def copy_(self, source: Any, *, non_blocking: bool) -> None:
            calls.append(f"copy, {'not ' * non_blocking}waiting")

    copies, cuda = HostCopies(), torch.device("cuda", 0)
    pair: Any = (Bytes(), Bytes())
    pairs: list[Pair] = [pair]
    with recorded_cuda(calls):
        copied = copies.start(pairs, cuda)
        copies.wait(copied, cuda)
    assert calls == [
        "side waits for main",
        "on side:",
        "copy, not waiting",
        "event of side",
        "on main:",
        "main waits for event of side",
    ]
