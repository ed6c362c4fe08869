"""Our exported class against what transformers, trainers and engines hand to it: renamed, unknown, packed, paged."""

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import ContinuousBatchingConfig, DynamicCache, GenerationConfig, LlamaForCausalLM
from transformers.utils import TransformersKwargs

from tests.unit.model_io.own_models import LENGTH, TOLERANCE, VOCABULARY, distance, export, load, tokens

NAME = "Tanuki with a shared expert"
CACHE = next(n for n in ("cache", "past_key_values") if n in inspect.signature(LlamaForCausalLM.forward).parameters)
"""What this version of transformers calls the cache."""


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load(export(tmp_path_factory.mktemp("export"), NAME)[1])


def filled(network: Any, count: int = 10) -> Any:
    """A cache with the first `count` tokens in it."""
    return network(tokens()[:, :count], use_cache=True)[CACHE]


@torch.no_grad()
@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_the_cache_goes_by_both_names(name: str, network: Any) -> None:
    whole = network(tokens()).logits[:, 10:]
    rest = network(tokens()[:, 10:], **{name: filled(network)})
    assert distance(rest.logits, whole) < TOLERANCE
    assert rest[CACHE].get_seq_length() == LENGTH
    trunk = network.model(tokens()[:, 10:], **{name: filled(network)})
    assert trunk[CACHE].get_seq_length() == LENGTH
    assert set(network._skip_keys_device_placement) >= {"cache", "past_key_values"}


def test_every_parameter_of_transformers_own_model_is_one_of_ours() -> None:
    """What transformers renames next, this finds."""
    from megatron_ext.model_io.huggingface.modeling import modeling_megatron_ext as shipped

    ours = set(inspect.signature(shipped.MegatronExtForCausalLM.forward).parameters)
    assert set(inspect.signature(LlamaForCausalLM.forward).parameters) <= ours
    assert shipped.MASK_CACHE == shipped.OUTPUT_CACHE == CACHE


@torch.no_grad()
def test_a_keyword_of_consequence_is_not_dropped(network: Any) -> None:
    for given, said in {
        "attention_cache": (filled(network), "takes the cache as cache or past_key_values, not as attention_cache"),
        "window": (4, "the keyword window is not known"),
        "output_router_logits": (True, "the keyword output_router_logits is not known"),
        "is_causal": (False, "is causal"),
        "cu_seq_lens_q": (torch.tensor([0, 4]), "needs position_ids"),
        "cache": (tuple(), "the cache is a tuple"),
    }.items():
        value, message = said
        with pytest.raises(TypeError, match=message):
            network(tokens()[:, 10:], **{given: value})
    with pytest.raises(TypeError, match="two names of one thing"):
        network(tokens(), cache=DynamicCache(), past_key_values=DynamicCache())


@torch.no_grad()
def test_a_keyword_that_says_nothing_changes_nothing(network: Any) -> None:
    expected = network(tokens(), labels=tokens())
    harmless = {
        "token_type_ids": torch.zeros_like(tokens()),
        "num_items_in_batch": torch.tensor(2 * (LENGTH - 1)),
        "output_router_logits": False,
        "window": None,
        "is_causal": True,
    }
    result = network(tokens(), labels=tokens(), **harmless)
    assert torch.equal(result.logits, expected.logits)
    assert torch.allclose(result.loss, expected.loss)
    halved = network(tokens(), labels=tokens(), num_items_in_batch=torch.tensor(4 * (LENGTH - 1)))
    assert torch.allclose(halved.loss, expected.loss / 2)
    # All that transformers says it hands to any model is either known here or refused above.
    known = {"num_items_in_batch", "output_hidden_states", "output_attentions", "output_router_logits", "cu_seq_lens_q"}
    known |= {"cu_seq_lens_k", "max_length_q", "max_length_k", "position_ids", "is_causal", "seq_idx"}
    assert set(TransformersKwargs.__annotations__) <= known


@torch.no_grad()
def test_rows_packed_into_one_are_apart(network: Any) -> None:
    ends = torch.tensor([0, 10, LENGTH], dtype=torch.int32)
    positions = torch.cat((torch.arange(10), torch.arange(LENGTH - 10)))[None]
    kernels = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": LENGTH - 10, "max_length_k": LENGTH - 10}
    packed = network(tokens()[:1], position_ids=positions, use_cache=False, **kernels).logits
    alone = [network(row).logits for row in (tokens()[:1, :10], tokens()[:1, 10:])]
    assert distance(packed, torch.cat(alone, dim=1)) < TOLERANCE


@torch.no_grad()
def test_logits_of_chosen_positions(network: Any) -> None:
    whole = network(tokens()).logits
    mask = torch.zeros(2, LENGTH, dtype=torch.bool)
    mask[0, 3:5], mask[1, 7] = True, True
    wanted = torch.tensor([[1, 4], [2, 9]])
    for keep, expected in (
        (3, whole[:, -3:]),
        (torch.tensor([0, 5]), whole[:, [0, 5]]),
        (wanted, torch.stack([row[chosen] for row, chosen in zip(whole, wanted, strict=True)])),
        (mask, whole[mask]),
    ):
        assert torch.allclose(network(tokens(), logits_to_keep=keep).logits, expected, atol=1e-5)


@torch.no_grad()
def test_attention_that_would_drop_sinks_is_refused(tmp_path: Path) -> None:
    network = load(export(tmp_path, "OLMoE with biases")[1])
    network.config._attn_implementation = "flex_attention"
    with pytest.raises(ValueError, match="flex_attention knows no attention sinks; set attn_implementation"):
        network(tokens())


@torch.no_grad()
def test_a_mask_that_adds_minus_infinity_hides_no_sink(tmp_path: Path) -> None:
    """Also in rows to which it hides the first token, such as those of a caller's own window of 4."""
    network = load(export(tmp_path, "OLMoE with biases")[1])
    hidden = ~torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril().triu(-3)
    mask = torch.zeros(2, 1, LENGTH, LENGTH).masked_fill(hidden, -torch.inf)
    network.config._attn_implementation = "sdpa"
    by_kernel = network(tokens(), attention_mask=mask).logits
    network.config._attn_implementation = "eager"
    assert distance(by_kernel, network(tokens(), attention_mask=mask).logits) < TOLERANCE


@pytest.mark.parametrize("name", [NAME, "Qwen2-MoE with learned noise"], ids=["all tokens", "windows"])
@torch.no_grad()
def test_continuous_batching_generates_what_generate_does(name: str, tmp_path: Path) -> None:
    """Of requests that come together in one row, with a paged cache of its own."""
    network = load(export(tmp_path, name)[1])
    prompts = [tokens()[0, :9].tolist(), tokens()[1, :5].tolist()]
    settings = GenerationConfig(max_new_tokens=5, do_sample=False, eos_token_id=-1, pad_token_id=0)
    small = ContinuousBatchingConfig(num_blocks=4, max_batch_tokens=32, page_size=8, use_async_batching=False)
    done = network.generate_batch(inputs=prompts, generation_config=settings, continuous_batching_config=small)
    made = sorted(request.generated_tokens for request in done.values())
    plain = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": VOCABULARY - 1}
    alone = [network.generate(torch.tensor([prompt]), **plain)[0, len(prompt) :].tolist() for prompt in prompts]
    assert made == sorted(alone)
