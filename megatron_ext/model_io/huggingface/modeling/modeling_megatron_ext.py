"""The language models that megatron_ext trains, for transformers 4.53 and later; needs torch and transformers only.

Attention goes through transformers' interface (`attn_implementation`: eager, sdpa, flash_attention_2, ...). A MoE layer
decides the routing and calls its child `experts` with it, so that serving engines can put fused kernels there.
"""

import inspect

import torch
import torch.nn.functional as F
from torch import nn
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel

from .configuration_megatron_ext import FULL, SLIDING, MegatronExtConfig
from .modeling_megatron_ext_attention import (
    MegatronExtAttention,
    MegatronExtLatentAttention,
    MegatronExtRotaryEmbedding,
    build_norm,
)
from .modeling_megatron_ext_moe import MegatronExtMLP, MegatronExtMoE, MegatronExtRouter

MASKS = {FULL: create_causal_mask, SLIDING: create_sliding_window_causal_mask}
# Transformers has changed what masks are made from: positions came with 4.54, cache positions left with 5.
MASK_ARGUMENTS = inspect.signature(create_causal_mask).parameters
# What `generate`, the mask and the outputs call the cache: `past_key_values` until transformers 5.23, then `cache`.
CACHE_NAMES = ("cache", "past_key_values")
# What the loss takes, which trainers give with and without labels; and token types, which tokenizers write for all.
NOT_FOR_ATTENTION = ("num_items_in_batch", "ignore_index", "shift_labels", "token_type_ids")
# Where the sequences packed into a row begin: flash kernels read it, the other ones go by `position_ids`.
PACKING = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")
# Transformers' own attention, which drops what it does not know. An engine's is handed everything.
OWN_ATTENTION = ("eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3", "flash_attention_4")


def _cache_name(names, where):
    """What this version of transformers calls the cache among `names` of `where`."""
    found = next((name for name in CACHE_NAMES if name in names), None)
    if found is None:
        raise ImportError(
            f"{where} of this version of transformers has neither {' nor '.join(CACHE_NAMES)}; this modelling code is "
            "for another one"
        )
    return found


MASK_CACHE = _cache_name(MASK_ARGUMENTS, "create_causal_mask")
OUTPUT_CACHE = _cache_name(BaseModelOutputWithPast.__dataclass_fields__, "BaseModelOutputWithPast")


class MegatronExtDecoderLayer(GradientCheckpointingLayer):
    """Attention and a feed-forward network, each after a norm and added to the residual stream."""

    def __init__(self, config: MegatronExtConfig, layer_idx):
        super().__init__()
        self.hidden_dropout = config.hidden_dropout
        self.input_layernorm = build_norm(config, config.hidden_size)
        attention = MegatronExtAttention if config.kv_lora_rank is None else MegatronExtLatentAttention
        self.self_attn = attention(config, layer_idx)
        self.post_attention_layernorm = build_norm(config, config.hidden_size)
        if config.is_moe_layer(layer_idx):
            self.mlp = MegatronExtMoE(config)
        else:
            self.mlp = MegatronExtMLP(config, config.intermediate_size)

    def forward(self, hidden_states, attentions=None, **kwargs):
        """Hidden states [B, S, H] -> [B, S, H]; the attention weights go into the list `attentions`, if there is one.

        Engines that hold some of the layers only hand hidden states past the others, so the output is one tensor.
        """
        attended, weights = self.self_attn(self.input_layernorm(hidden_states), **kwargs)
        if attentions is not None:
            attentions.append(weights)
        hidden_states = hidden_states + self._dropout(attended)
        computed = self.mlp(self.post_attention_layernorm(hidden_states))
        return hidden_states + self._dropout(computed)

    def _dropout(self, x):
        return F.dropout(x, p=self.hidden_dropout, training=self.training)


class MegatronExtPreTrainedModel(PreTrainedModel):
    """What transformers needs to know about loading and placing the model."""

    config_class = MegatronExtConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["MegatronExtDecoderLayer"]
    _skip_keys_device_placement = list(CACHE_NAMES)
    _supports_attention_backend = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    # Transformers before 4.54 asks for these two.
    _supports_flash_attn_2 = True
    _supports_cache_class = True
    # Which experts run depends on the tokens, so the forward pass is no single graph.
    _can_compile_fullgraph = False

    def _init_weights(self, module):
        std = self.config.initializer_range
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=std)
        elif isinstance(module, nn.RMSNorm | nn.LayerNorm):
            nn.init.ones_(module.weight)
        elif isinstance(module, MegatronExtAttention) and module.sinks is not None:
            nn.init.normal_(module.sinks, std=std)
        elif isinstance(module, MegatronExtRouter):
            nn.init.normal_(module.weight, std=std)
            if module.e_score_correction_bias is not None:
                nn.init.zeros_(module.e_score_correction_bias)
            if hasattr(module, "noise_weight"):
                nn.init.zeros_(module.noise_weight)
        if getattr(module, "bias", None) is not None:
            nn.init.zeros_(module.bias)


class MegatronExtModel(MegatronExtPreTrainedModel):
    """The layers without the output head."""

    def __init__(self, config: MegatronExtConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.rotary_emb = None
        if config.position_embedding_type == "learned":
            self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        else:
            self.rotary_emb = MegatronExtRotaryEmbedding(config)
        self.layers = nn.ModuleList(MegatronExtDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = build_norm(config, config.hidden_size)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self):
        return self.embed_tokens

    def set_input_embeddings(self, value):
        self.embed_tokens = value

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        use_cache=None,
        output_attentions=None,
        output_hidden_states=None,
        return_dict=None,
        cache=None,
        **kwargs,
    ):
        """Token ids [B, S], or their embeddings [B, S, H] before `embedding_multiplier`, -> hidden states [B, S, H].

        Args:
            attention_mask: [B, cached + S], 0 where a token is padding, or what attention takes, by type of layer.
                Positions that are not given count from the first token that is no padding.
            cache: keys and values of the tokens before; `past_key_values` is its older name.
            kwargs: for the attention that is in use.

        Raises:
            TypeError: for a keyword that would change nothing although it says something.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        self._refuse_several_in_a_row()
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        output_attentions = self.config.output_attentions if output_attentions is None else output_attentions
        keep_all = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        cache, cache_position = _one_cache(cache, past_key_values), kwargs.pop("cache_position", None)
        kwargs = {name: value for name, value in kwargs.items() if name not in NOT_FOR_ATTENTION}
        if cache is None or isinstance(cache, Cache):
            self._refuse_dropped(kwargs, has_positions=position_ids is not None)
        elif MASK_CACHE == "past_key_values":  # transformers' paged attention filled its cache itself then
            kwargs["cache"], cache = cache, None
        if self.gradient_checkpointing and self.training:
            use_cache, cache = False, None  # a layer that is computed again would enter its keys twice
        elif use_cache is None:
            use_cache = self.config.use_cache
        if use_cache and cache is None:
            cache = DynamicCache()
        cache_position, position_ids, masks = self._place(hidden, attention_mask, position_ids, cache, cache_position)
        hidden, rotation = self._embed(hidden, position_ids)
        all_hidden, attentions = [hidden] if keep_all else [], [] if output_attentions else None
        for number, layer in enumerate(self.layers):
            hidden = layer(
                hidden,
                rotation=rotation,
                attention_mask=masks[self.config.layer_type(number)],
                position_ids=position_ids,
                past_key_values=cache,
                cache_position=cache_position,
                attentions=attentions,
                **kwargs,
            )
            if keep_all:
                all_hidden.append(hidden)
        hidden = self.norm(hidden)
        output = BaseModelOutputWithPast(
            last_hidden_state=hidden,
            hidden_states=(*all_hidden[:-1], hidden) if keep_all else None,
            attentions=tuple(attentions) if output_attentions else None,
            **{OUTPUT_CACHE: cache if use_cache else None},
        )
        return output if _wants_names(self.config, return_dict) else output.to_tuple()

    def _refuse_several_in_a_row(self):
        """Raise NotImplementedError where angles go by a row's length and an engine may put requests together."""
        attention = self.config._attn_implementation or "eager"
        if self.rotary_emb is not None and self.rotary_emb.is_dynamic and attention not in OWN_ATTENTION:
            raise NotImplementedError(
                f"{type(self).__name__}: dynamic RoPE goes by the longest position of a row, and with "
                f"attn_implementation = {attention!r} a row may have several requests; take transformers' own attention"
            )

    def _refuse_dropped(self, kwargs, has_positions):
        """Raise TypeError for what attention would drop although it says something: a rename must not go unnoticed."""
        attention = self.config._attn_implementation or "eager"
        packing = PACKING if has_positions or attention.startswith("flash") else ()
        for name, value in kwargs.items():
            if isinstance(value, Cache):
                raise TypeError(f"{type(self).__name__} takes the cache as {' or '.join(CACHE_NAMES)}, not as {name}")
            if name == "is_causal" and value is False:
                raise TypeError(f"{type(self).__name__} is causal, so is_causal=False is not for it")
            if attention not in OWN_ATTENTION or value is None or value is False or name in ("is_causal", *packing):
                continue
            why = "needs position_ids beside it" if name in PACKING else "is not known here"
            raise TypeError(f"{type(self).__name__}: the keyword {name} {why}, and would be dropped silently")

    def _place(self, hidden, attention_mask, position_ids, cache, cache_position):
        """Where tokens are in the cache [S] and in their rows [B, S]; what attention hides in each type of layer."""
        if cache_position is None:  # generate gives it, before transformers 5
            seen = cache.get_seq_length() if isinstance(cache, Cache) else 0
            cache_position = torch.arange(hidden.shape[1], device=hidden.device) + seen
        masks = attention_mask if isinstance(attention_mask, dict) else None  # ready, by type of layer: an engine's
        if position_ids is None:
            position_ids = _positions(None if masks else attention_mask, cache_position)
        places = {"cache_position": cache_position, "position_ids": position_ids}
        known = {name: value for name, value in places.items() if name in MASK_ARGUMENTS}
        types = {self.config.layer_type(number) for number in range(self.config.num_hidden_layers)}
        given = {MASK_CACHE: cache, **known}
        masks = masks or {name: MASKS[name](self.config, hidden, attention_mask, **given) for name in types}
        return cache_position, position_ids, masks

    def _embed(self, embedded, position_ids):
        """What enters the first layer [B, S, H], and the rotation of queries and keys, if positions are rotations."""
        embedded = embedded * self.config.embedding_multiplier
        rotation = None
        if self.rotary_emb is None:
            embedded = embedded + self.embed_positions(position_ids)
        else:
            rotation = self.rotary_emb(position_ids, embedded.dtype)
        return F.dropout(embedded, p=self.config.hidden_dropout, training=self.training), rotation


def _one_cache(cache, past_key_values):
    """The cache, given by either name."""
    if cache is not None and past_key_values is not None and cache is not past_key_values:
        raise TypeError("cache and past_key_values are two names of one thing; give one of them")
    given = past_key_values if cache is None else cache
    if given is not None and not hasattr(given, "update"):
        raise TypeError(f"the cache is a {type(given).__name__}; it must be a Cache of transformers: DynamicCache, ...")
    return given


def _positions(attention_mask, cache_position):
    """Positions [B, S] of tokens after padding on the left; [1, S] where no mask tells of padding."""
    if attention_mask is None or attention_mask.dim() != 2:
        return cache_position.unsqueeze(0)
    counted = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
    return counted[:, -len(cache_position) :]


def _kept(hidden, logits_to_keep):
    """The hidden states [B, S, H] of the positions that logits are wanted of."""
    if isinstance(logits_to_keep, int):
        return hidden[:, -logits_to_keep:] if logits_to_keep else hidden
    if logits_to_keep.dim() == 1:
        return hidden[:, logits_to_keep]
    if logits_to_keep.dtype == torch.bool:
        return hidden[logits_to_keep]
    return torch.take_along_dim(hidden, logits_to_keep.unsqueeze(-1), dim=1)


def _wants_names(config, return_dict):
    return config.return_dict if return_dict is None else return_dict


class MegatronExtForCausalLM(MegatronExtPreTrainedModel, GenerationMixin):
    """The language model."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_rep"}

    def __init__(self, config: MegatronExtConfig):
        super().__init__(config)
        self.model = MegatronExtModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.model.embed_tokens

    def set_input_embeddings(self, value):
        self.model.embed_tokens = value

    def get_output_embeddings(self):
        return self.lm_head

    def set_output_embeddings(self, value):
        self.lm_head = value

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        labels=None,
        use_cache=None,
        output_attentions=None,
        output_hidden_states=None,
        return_dict=None,
        logits_to_keep=0,
        cache=None,
        **kwargs,
    ):
        """Token ids [B, S] -> logits [B, S, vocab], and the loss of `labels` [B, S] (-100: ignored) if given.

        Args:
            logits_to_keep: logits of the last so many positions only (0: all), or of the positions of a tensor: the
                same ones of all rows, or [B, n] with each row's, or a mask [B, S] that leaves logits [n, vocab].
            cache: keys and values of the tokens before; `past_key_values` is its older name.
            kwargs: for the loss and for the attention that is in use.

        Raises:
            TypeError: for a keyword that would change nothing although it says something.
        """
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=_one_cache(cache, past_key_values),
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
            **kwargs,
        )
        logits = self.lm_head(_kept(output.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        result = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
            **{OUTPUT_CACHE: output.get(OUTPUT_CACHE)},
        )
        return result if _wants_names(self.config, return_dict) else result.to_tuple()


__all__ = ["MegatronExtConfig", "MegatronExtForCausalLM", "MegatronExtModel"]
