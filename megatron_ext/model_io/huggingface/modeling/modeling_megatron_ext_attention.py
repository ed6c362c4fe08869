"""Positions and attention of a megatron_ext model: RoPE with every scaling, grouped-query and latent attention."""

import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers.cache_utils import Cache
from transformers.modeling_utils import AttentionInterface

from .configuration_megatron_ext import SLIDING, MegatronExtConfig


def build_norm(config: MegatronExtConfig, width):
    """The norm that the model uses everywhere, over `width` elements."""
    kind = nn.RMSNorm if config.norm_type == "rms_norm" else nn.LayerNorm
    return kind(width, eps=config.norm_eps)


class MegatronExtRotaryEmbedding(nn.Module):
    """Cosine and sine of every position's angles, from the configuration alone: there is no buffer to lose.

    With dynamic scaling each row has the angles of its own length. As in transformers' models, keys in a cache keep the
    angles of the length they were computed at.
    """

    def __init__(self, config: MegatronExtConfig):
        super().__init__()
        self.width = config.rotary_width
        self.rope = config.rope_parameters
        self.is_dynamic = self.rope["rope_type"] == "dynamic"
        self.trained_length = config.max_position_embeddings
        self._frequencies = {}

    def forward(self, position_ids, dtype):
        """Position ids [B, S] -> cosine and sine [B, 1, S, rotary_width / 2]."""
        if self.is_dynamic:
            lengths = position_ids.amax(dim=-1, keepdim=True) + 1
            frequencies = self._dynamic_frequencies(lengths)[:, None]
        else:
            frequencies = self._fixed_frequencies(position_ids.device)
        angles = (position_ids[..., None].float() * frequencies).unsqueeze(1)
        factor = cosine_factor(self.rope)
        return (angles.cos() * factor).to(dtype), (angles.sin() * factor).to(dtype)

    def _dynamic_frequencies(self, lengths):
        """Dynamic NTK: theta grows so that the slowest dimension turns as far as in training. [B, 1] -> [B, R / 2]."""
        stretch = self.rope["factor"] * lengths.double().clamp(min=self.trained_length) / self.trained_length
        stretch = stretch - (self.rope["factor"] - 1)
        theta = (self.rope["rope_theta"] * stretch ** (self.width / (self.width - 2))).float()
        return 1.0 / theta ** (torch.arange(0, self.width, 2, device=lengths.device).float() / self.width)

    def _fixed_frequencies(self, device):
        if device not in self._frequencies:
            self._frequencies[device] = inverse_frequencies(self.rope, self.width).to(device)
        return self._frequencies[device]


def inverse_frequencies(rope, width):
    """Angle by which each pair of `width` dimensions turns from one position to the next, [width / 2] in fp32."""
    frequencies = 1.0 / rope["rope_theta"] ** (torch.arange(0, width, 2, device="cpu").float() / width)
    if rope["rope_type"] == "linear":
        return frequencies / rope["factor"]
    if rope["rope_type"] == "llama3":
        turns = rope["original_max_position_embeddings"] * frequencies / (2 * math.pi)
        low, high = rope.get("low_freq_factor", 1.0), rope.get("high_freq_factor", 4.0)
        kept = ((turns - low) / (high - low)).clamp(0, 1)
    elif rope["rope_type"] == "yarn":
        first, last = _yarn_band(rope, width)
        kept = 1 - ((torch.arange(len(frequencies), device="cpu") - first) / (last - first or 1e-3)).clamp(0, 1)
    else:
        return frequencies
    return (1 - kept) * frequencies / rope["factor"] + kept * frequencies


def _yarn_band(rope, width):
    """The pairs between which YaRN (arXiv 2309.00071, section 3.2) goes over from keeping to interpolating."""

    def pair(turns):
        longest = rope["original_max_position_embeddings"] / (turns * 2 * math.pi)
        return width * math.log(longest) / (2 * math.log(rope["rope_theta"]))

    first, last = pair(rope.get("beta_fast", 32.0)), pair(rope.get("beta_slow", 1.0))
    if rope.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    return max(first, 0), min(last, width - 1)


def cosine_factor(rope):
    """YaRN's factor on cosine and sine (section 3.3), with DeepSeek's `mscale` and `mscale_all_dim`."""
    if rope["rope_type"] != "yarn":
        return 1.0
    mscale, of_all = rope.get("mscale"), rope.get("mscale_all_dim")
    if mscale and of_all:
        return _magnitude(rope["factor"], mscale) / _magnitude(rope["factor"], of_all)
    return _magnitude(rope["factor"], 1.0)


def _magnitude(factor, mscale):
    return 0.1 * mscale * math.log(factor) + 1.0


def rotate(heads, rotation):
    """Turn pairs of the last dimension, whose halves hold the pairs' first and second elements.

    Args:
        heads: [B, heads, S, D]; of D what `rotation` does not reach is left as it is.
        rotation: cosine and sine [B, 1, S, R / 2].
    """
    cosine, sine = rotation
    half = cosine.shape[-1]
    first, second, rest = heads.split((half, half, heads.shape[-1] - 2 * half), dim=-1)
    return torch.cat((first * cosine - second * sine, second * cosine + first * sine, rest), dim=-1)


def eager_attention(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """Attention written out; returns the context [B, S, heads, D] and the attention weights."""
    key, value = (x.repeat_interleave(module.num_key_value_groups, dim=1) for x in (key, value))
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask[..., : key.shape[-2]]
    if module.sinks is not None:
        scores = torch.cat((scores, module.sinks[:, None, None].expand(*scores.shape[:3], 1)), dim=-1)
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)[..., : key.shape[-2]]
    weights = F.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


def sdpa_attention_with_sinks(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """The same by torch's kernels, without the weights: the sink is the score of a last key, whose value is zero.

    That key has a 1 in a dimension of its own, in which the others have 0, and every query of a head its sink.
    """
    width, (rows, keys) = query.shape[-1], (query.shape[2], key.shape[2])
    key, value = (x.repeat_interleave(module.num_key_value_groups, dim=1) for x in (key, value))
    sinks = (module.sinks / scaling).to(query.dtype)[:, None, None].expand(*query.shape[:3], 1)
    key, value = F.pad(key, (0, 1, 0, 1)), F.pad(value, (0, 1, 0, 1))
    key[:, :, -1, -1] = 1.0
    if attention_mask is None:  # all are seen that were there before
        attention_mask = torch.ones(rows, keys, dtype=torch.bool, device=query.device).tril(keys - rows)
    mask = attention_mask[..., :keys]
    shown = torch.full_like(mask[..., :1], 1 if mask.dtype == torch.bool else 0)  # a mask of numbers is added
    mask = torch.cat((mask, shown), dim=-1)
    context = F.scaled_dot_product_attention(
        torch.cat((query, sinks), dim=-1), key, value, attn_mask=mask, dropout_p=dropout, scale=scaling
    )
    return context[..., :width].transpose(1, 2).contiguous(), None


# Engines (vLLM) read the forward pass of attention for one call of what is looked up under this name, with its scaling.
ALL_ATTENTION_FUNCTIONS = AttentionInterface()
ALL_ATTENTION_FUNCTIONS["eager"] = eager_attention
ALL_ATTENTION_FUNCTIONS["sdpa with sinks"] = sdpa_attention_with_sinks
WITH_SINKS = {"eager": "eager", "sdpa": "sdpa with sinks"}


def implementation(module):
    """The name of the attention that the user chose.

    Raises:
        ValueError: it knows no sinks, and would leave them out silently.
    """
    name = module.config._attn_implementation or "eager"
    if module.sinks is None:
        return name
    if name not in WITH_SINKS:
        raise ValueError(f"{name} knows no attention sinks; set attn_implementation to {' or '.join(WITH_SINKS)}")
    return WITH_SINKS[name]


def through_cache(module, key, value, cache, cache_position, kwargs):
    """Keys and values [B, heads, S, D] with those before them, if there is a `cache`."""
    if cache is None:
        return key, value
    if isinstance(cache, Cache):
        return cache.update(key, value, module.layer_idx, {"cache_position": cache_position})
    return cache.update(key, value, module.layer_idx, kwargs=kwargs)  # paged: it changes the kernel's keywords, too


class MegatronExtAttention(nn.Module):
    """Grouped-query attention, in some layers within a sliding window, with a sink for each head if there are any."""

    is_causal = True

    def __init__(self, config: MegatronExtConfig, layer_idx):
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = config.head_dim**-0.5
        hidden, bias = config.hidden_size, config.qkv_bias or config.use_bias
        queries, keys = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
        self.q_proj = nn.Linear(hidden, queries, bias=bias)
        self.k_proj = nn.Linear(hidden, keys, bias=bias)
        self.v_proj = nn.Linear(hidden, keys, bias=bias)
        self.o_proj = nn.Linear(queries, hidden, bias=config.use_bias)
        self.sliding_window = config.sliding_window if config.layer_type(layer_idx) == SLIDING else None
        sinks = nn.Parameter(torch.empty(config.num_attention_heads)) if config.attention_sinks else None
        self.register_parameter("sinks", sinks)
        if config.qk_norm is not None:
            over_heads = config.qk_norm == "head"
            self.q_norm = build_norm(config, config.head_dim if over_heads else queries)
            self.k_norm = build_norm(config, config.head_dim if over_heads else keys)

    def forward(
        self, hidden_states, rotation, attention_mask=None, past_key_values=None, cache_position=None, **kwargs
    ):
        """Hidden states [B, S, H] -> [B, S, H] and the attention weights, or None where the kernel gives none."""
        query, key, value = self.q_proj(hidden_states), self.k_proj(hidden_states), self.v_proj(hidden_states)
        if self.config.qk_norm == "projection":
            query, key = self.q_norm(query), self.k_norm(key)
        query, key, value = (x.unflatten(-1, (-1, self.config.head_dim)).transpose(1, 2) for x in (query, key, value))
        if self.config.qk_norm == "head":
            query, key = self.q_norm(query), self.k_norm(key)
        if rotation is not None:
            query, key = rotate(query, rotation), rotate(key, rotation)
        key, value = through_cache(self, key, value, past_key_values, cache_position, kwargs)
        if self.sliding_window is not None:  # flash kernels take no mask
            kwargs["sliding_window"] = self.sliding_window
        attention = ALL_ATTENTION_FUNCTIONS[implementation(self)]
        dropout = self.config.attention_dropout if self.training else 0.0
        context, weights = attention(
            self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs
        )
        return self.o_proj(context.reshape(*hidden_states.shape[:-1], -1)), weights


class MegatronExtLatentAttention(nn.Module):
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1), with DeepSeek's names of weights.

    The rotated dimensions come out of the projections as interleaved pairs.
    """

    is_causal = True
    num_key_value_groups = 1
    sliding_window = sinks = None

    def __init__(self, config: MegatronExtConfig, layer_idx):
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.scaling = config.head_dim**-0.5
        if config.rope_parameters["rope_type"] == "yarn":
            factor, of_all = config.rope_parameters["factor"], config.rope_parameters.get("mscale_all_dim", 0.0)
            self.scaling *= _magnitude(factor, of_all) ** 2
        hidden, heads = config.hidden_size, config.num_attention_heads
        if config.q_lora_rank is None:
            self.q_proj = nn.Linear(hidden, heads * config.head_dim, bias=False)
        else:
            self.q_a_proj = nn.Linear(hidden, config.q_lora_rank, bias=False)
            self.q_a_layernorm = build_norm(config, config.q_lora_rank)
            self.q_b_proj = nn.Linear(config.q_lora_rank, heads * config.head_dim, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(hidden, config.kv_lora_rank + config.qk_rope_head_dim, bias=False)
        self.kv_a_layernorm = build_norm(config, config.kv_lora_rank)
        self.kv_b_proj = nn.Linear(
            config.kv_lora_rank, heads * (config.qk_nope_head_dim + config.v_head_dim), bias=False
        )
        self.o_proj = nn.Linear(heads * config.v_head_dim, hidden, bias=False)

    def forward(
        self, hidden_states, rotation, attention_mask=None, past_key_values=None, cache_position=None, **kwargs
    ):
        """Hidden states [B, S, H] -> [B, S, H] and the attention weights, or None where the kernel gives none."""
        plain, rotated = self.config.qk_nope_head_dim, self.config.qk_rope_head_dim
        if self.config.q_lora_rank is None:
            query = self.q_proj(hidden_states)
        else:
            query = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(hidden_states)))
        query = query.unflatten(-1, (-1, plain + rotated)).transpose(1, 2)
        query, turned_query = query.split((plain, rotated), dim=-1)
        latent, turned_key = self.kv_a_proj_with_mqa(hidden_states).split((self.config.kv_lora_rank, rotated), dim=-1)
        expanded = self.kv_b_proj(self.kv_a_layernorm(latent))
        expanded = expanded.unflatten(-1, (-1, plain + self.config.v_head_dim)).transpose(1, 2)
        key, value = expanded.split((plain, self.config.v_head_dim), dim=-1)
        turned_query = rotate(_halves(turned_query), rotation)
        turned_key = rotate(_halves(turned_key.unsqueeze(1)), rotation)
        query = torch.cat((query, turned_query), dim=-1)
        key = torch.cat((key, turned_key.expand(-1, key.shape[1], -1, -1)), dim=-1)
        key, value = through_cache(self, key, value, past_key_values, cache_position, kwargs)
        is_flash = "flash" in implementation(self)  # its kernels know one width only
        if is_flash:
            value = F.pad(value, (0, key.shape[-1] - self.config.v_head_dim))
        attention = ALL_ATTENTION_FUNCTIONS[implementation(self)]
        dropout = self.config.attention_dropout if self.training else 0.0
        context, weights = attention(
            self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs
        )
        if is_flash:
            context = context[..., : self.config.v_head_dim]
        return self.o_proj(context.reshape(*hidden_states.shape[:-1], -1)), weights


def _halves(interleaved):
    """The first elements of all pairs, then the second ones."""
    return torch.cat((interleaved[..., 0::2], interleaved[..., 1::2]), dim=-1)
