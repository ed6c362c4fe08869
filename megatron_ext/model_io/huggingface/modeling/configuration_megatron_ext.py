"""Configuration of a megatron_ext model: any architecture and router that the training framework can express."""

from transformers import PretrainedConfig

# Per RoPE type: parameters that must be given, and those that may be.
ROPE_TYPES = {
    "default": (set(), set()),
    "linear": ({"factor"}, set()),
    "dynamic": ({"factor"}, {"original_max_position_embeddings"}),
    "llama3": ({"factor", "original_max_position_embeddings"}, {"low_freq_factor", "high_freq_factor"}),
    "yarn": (
        {"factor", "original_max_position_embeddings"},
        {"beta_fast", "beta_slow", "truncate", "mscale", "mscale_all_dim"},
    ),
}
# Where configurations before transformers 5 have these.
BESIDE_ROPE = ("rope_theta", "partial_rotary_factor")
ROPE_COMMON = {"rope_type", *BESIDE_ROPE}
FULL, SLIDING = "full_attention", "sliding_attention"
ROUTER_NOISE = {"gumbel": {"scale"}, "learned": set(), "input_jitter": {"eps"}}
CHOICES = {
    "norm_type": ("rms_norm", "layer_norm"),
    "hidden_act": ("silu", "gelu", "gelu_pytorch_tanh", "quick_gelu"),
    "position_embedding_type": ("rope", "learned"),
    "qk_norm": (None, "head", "projection"),
    "scoring_func": ("softmax", "sigmoid"),
    "group_score": ("top2_sum", "max"),
}
# What only a model with experts can have, and its value in a dense one. What is shipped reads nothing of the framework:
# a test there derives this from the tags of its fields.
MOE_ONLY = {
    "num_experts_per_tok": 2,
    "shared_expert_intermediate_size": None,
    "shared_expert_gate": False,
    "moe_intermediate_size": None,
    "moe_layer_pattern": None,
    "scoring_func": "softmax",
    "softmax_before_topk": False,
    "norm_topk_prob": None,
    "routed_scaling_factor": None,
    "n_group": None,
    "topk_group": None,
    "group_score": "top2_sum",
    "router_bias": False,
    "expert_bias": False,
    "gating_normalization": None,
    "router_noise": None,
}


class MegatronExtConfig(PretrainedConfig):
    """A decoder-only language model, dense or Mixture-of-Experts.

    Args:
        intermediate_size: width of a dense feed-forward layer.
        head_dim: width of a head; default hidden_size / num_attention_heads.
        norm_type: `rms_norm` or `layer_norm`, everywhere; `norm_eps` is its epsilon.
        hidden_act: `silu`, `gelu`, `gelu_pytorch_tanh` or `quick_gelu` (x sigmoid(1.702 x)); with `gated_mlp` it
            multiplies a second projection (SwiGLU).
        glu_limit: the gate is cut off above it, the second projection on both sides (gpt-oss: 7); glu_offset: added to
            the second projection (gpt-oss: 1).
        qkv_bias: biases of the query, key and value projections; `use_bias`: of every linear layer but router and head.
        qk_norm: a norm of queries and keys over each `head`, or over the whole `projection`.
        sliding_window: positions that a query attends to, its own included; default all.
        layer_types: `sliding_attention` for each layer that has this window, `full_attention` for others; default all.
        attention_sinks: a learned logit of each head joins the softmax and has no value (gpt-oss).
        position_embedding_type: `rope` or `learned` (a vector for each of `max_position_embeddings`).
        rope_parameters: `rope_type` (default, linear, dynamic, llama3, yarn), `rope_theta` and the type's parameters;
            `rope_theta`, `rope_scaling` and `partial_rotary_factor` beside it are read too, and must not disagree.
        kv_lora_rank: with it attention is multi-head latent attention (DeepSeek-V2), of q_lora_rank (null: queries are
            projected directly), qk_nope_head_dim, qk_rope_head_dim and v_head_dim.
        embedding_multiplier: factor on the token embedding.
        num_experts: routed experts of a MoE layer; 0: every layer is dense.
        num_experts_per_tok: experts that each token is sent to.
        moe_intermediate_size: width of a routed expert; default intermediate_size.
        moe_layer_pattern: one entry a layer, 1 is MoE and 0 is dense; default all MoE.
        shared_expert_intermediate_size: width of the shared experts together, `shared_expert_gate`: behind a gate.
        scoring_func: `softmax` or `sigmoid` of the router's logits.
        softmax_before_topk: True: softmax over all experts, then select. False: softmax over the selected experts.
        norm_topk_prob: divide the selected scores by their sum; default: with sigmoid.
        routed_scaling_factor: factor on the weights of the selected experts.
        n_group: experts form this many groups, tokens go to experts of the best `topk_group` only; a group is worth its
            two best experts' sum or its best one (`group_score`: `top2_sum`, `max`).
        router_bias: the router's logits have a bias (gpt-oss).
        expert_bias: each expert has a bias that takes part in the selection only (DeepSeek-V3).
        gating_normalization: `{"scale", "eps", "correction"}`: each token's router logits are standardised over the
            experts and scaled (Skywork-MoE, Tanuki), always.
        router_noise: in training only: `{"kind": "gumbel", "scale"}`, `{"kind": "learned"}` or
            `{"kind": "input_jitter", "eps"}`.
        hidden_dropout: of the embedding and of each layer's two outputs; attention_dropout: of attention weights.
        megatron_training: how the framework trains it further (balance losses, capacity); nothing here reads it.

    Raises:
        ValueError: listing every value that is unknown and all that contradict each other.
    """

    model_type = "megatron_ext"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]

    def __init__(
        self,
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=None,
        head_dim=None,
        max_position_embeddings=4096,
        norm_type="rms_norm",
        norm_eps=1e-5,
        hidden_act="silu",
        gated_mlp=True,
        glu_limit=None,
        glu_offset=0.0,
        qkv_bias=False,
        use_bias=False,
        qk_norm=None,
        sliding_window=None,
        layer_types=None,
        attention_sinks=False,
        position_embedding_type="rope",
        rope_theta=None,
        rope_parameters=None,
        rope_scaling=None,
        partial_rotary_factor=None,
        kv_lora_rank=None,
        q_lora_rank=None,
        qk_nope_head_dim=None,
        qk_rope_head_dim=None,
        v_head_dim=None,
        embedding_multiplier=1.0,
        num_experts=0,
        num_experts_per_tok=2,
        moe_intermediate_size=None,
        moe_layer_pattern=None,
        shared_expert_intermediate_size=None,
        shared_expert_gate=False,
        scoring_func="softmax",
        softmax_before_topk=False,
        norm_topk_prob=None,
        routed_scaling_factor=None,
        n_group=None,
        topk_group=None,
        group_score="top2_sum",
        router_bias=False,
        expert_bias=False,
        gating_normalization=None,
        router_noise=None,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        megatron_training=None,
        initializer_range=0.02,
        use_cache=True,
        tie_word_embeddings=False,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
        **kwargs,
    ):
        given = {name: value for name, value in locals().items() if name not in ("self", "kwargs", "__class__")}
        rope = {name: given.pop(name) for name in ("rope_parameters", "rope_scaling", *BESIDE_ROPE)}
        special = {name: given.pop(name) for name in list(given) if name.endswith("_token_id")}
        super().__init__(**special, tie_word_embeddings=given.pop("tie_word_embeddings"), **kwargs)
        for name, value in given.items():
            setattr(self, name, value)
        if sliding_window is not None and layer_types is None:  # transformers' caches read it
            self.layer_types = [SLIDING] * num_hidden_layers
        self.num_experts = num_experts or 0
        self.num_key_value_heads = num_key_value_heads or num_attention_heads
        if self.num_experts:
            self.moe_intermediate_size = moe_intermediate_size or intermediate_size
            self.moe_layer_pattern = list(moe_layer_pattern or [1] * num_hidden_layers)
            if norm_topk_prob is None and not self.weights_sum_to_one:
                self.norm_topk_prob = scoring_func == "sigmoid" and num_experts_per_tok > 1
        if kv_lora_rank is None:
            self.head_dim = head_dim or hidden_size // num_attention_heads
        else:
            self.head_dim = (qk_nope_head_dim or 0) + (qk_rope_head_dim or 0)
        problems = self._read_rope(rope) + _problems(self)
        if head_dim not in (None, self.head_dim):
            problems.append(f"head_dim = {head_dim}: with kv_lora_rank it is qk_nope_head_dim + qk_rope_head_dim")
        if problems:
            raise ValueError("\n  ".join([f"this is no {type(self).__name__}:", *problems]))
        self.base_model_tp_plan = _tensor_parallel_plan(self)
        # Engines feed a later stage its hidden states as `inputs_embeds`, which are scaled and given positions.
        if embedding_multiplier == 1.0 and position_embedding_type == "rope":
            self.base_model_pp_plan = {
                "embed_tokens": (["input_ids"], ["inputs_embeds"]),
                "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
                "norm": (["hidden_states"], ["hidden_states"]),
            }

    @property
    def weights_sum_to_one(self):
        """Whether routing weights are a softmax over the selected experts."""
        return self.scoring_func == "softmax" and not self.softmax_before_topk

    @property
    def rotary_width(self):
        """Width of the rotated part of a head's query and key."""
        if self.kv_lora_rank is not None:
            return self.qk_rope_head_dim
        return int(self.head_dim * self.rotated_share)

    def layer_type(self, layer_idx):
        """Whether layer `layer_idx` has the window, in the words of `layer_types`."""
        return FULL if self.layer_types is None else self.layer_types[layer_idx]

    def is_moe_layer(self, layer_idx):
        """Whether layer `layer_idx` has experts."""
        return bool(self.num_experts and self.moe_layer_pattern[layer_idx])

    @property
    def rotated_share(self):
        """Share of a head that is rotated."""
        return self.rope_parameters.get("partial_rotary_factor", 1.0)

    def _read_rope(self, given):
        """Set `rope_parameters` (and `rope_theta`, for old readers) from all places; return what contradicts."""
        stated, problems = {}, []
        beside = {name: given[name] for name in BESIDE_ROPE}
        for place in (given["rope_parameters"] or {}, given["rope_scaling"] or {}, beside):
            for name, value in place.items():
                name = "rope_type" if name == "type" else name
                if value is not None and stated.setdefault(name, value) != value:
                    problems.append(f"{name} is {stated[name]!r} and {value!r} at once")
        if stated.get("partial_rotary_factor") == 1.0:
            del stated["partial_rotary_factor"]
        self.rope_parameters = {"rope_type": "default", "rope_theta": 10000.0, **stated}
        self.rope_theta = self.rope_parameters["rope_theta"]
        return problems


def _problems(config):
    """Everything that is wrong with a configuration, one sentence each."""
    problems = [
        f"{name} = {getattr(config, name)!r}: expected one of {', '.join(map(repr, allowed))}"
        for name, allowed in CHOICES.items()
        if getattr(config, name) not in allowed
    ]
    problems += [
        f"{name} = {getattr(config, name)!r}: only a gated network has that; set gated_mlp = True"
        for name, neutral in (("glu_limit", None), ("glu_offset", 0.0))
        if not config.gated_mlp and getattr(config, name) != neutral
    ]
    checks = [_rope_problems, _window_problems, _attention_problems]
    checks += [_mixture_problems if config.num_experts else _dense_problems]
    for check in checks:
        problems += [sentence for wrong, sentence in check(config) if wrong]
    return problems


def _rope_problems(config):
    parameters = config.rope_parameters
    kind = parameters["rope_type"]
    required, optional = ROPE_TYPES.get(kind, (set(), set()))
    missing, unknown = required - set(parameters), set(parameters) - required - optional - ROPE_COMMON
    original = parameters.get("original_max_position_embeddings")
    yield kind not in ROPE_TYPES, f"rope_type = {kind!r}: expected one of {', '.join(ROPE_TYPES)}"
    yield bool(missing), f"rope_type {kind} needs {', '.join(sorted(missing))}"
    yield kind in ROPE_TYPES and bool(unknown), f"rope_type {kind} has no {', '.join(sorted(unknown))}"
    yield (
        kind == "dynamic" and original not in (None, config.max_position_embeddings),
        "dynamic RoPE is scaled beyond max_position_embeddings; original_max_position_embeddings cannot be another",
    )
    width = config.rotary_width or 0
    is_rope = config.position_embedding_type == "rope"
    yield is_rope and (width < 2 or width % 2), f"RoPE rotates pairs, and {width} dimensions of a head are rotated"
    yield (
        not is_rope and (kind != "default" or config.rotated_share != 1.0),
        "learned positions are not rotated; remove the RoPE parameters",
    )


def _window_problems(config):
    window, types = config.sliding_window, config.layer_types
    yield window is not None and window < 1, f"sliding_window = {window}: a query attends to itself at least"
    if types is None:
        return
    yield (
        len(types) != config.num_hidden_layers or not set(types) <= {FULL, SLIDING},
        f"layer_types needs {FULL} or {SLIDING} for each of {config.num_hidden_layers} layers",
    )
    yield window is None and SLIDING in types, f"layer_types has {SLIDING}, which needs sliding_window"


def _attention_problems(config):
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    yield heads % groups, f"num_attention_heads = {heads} is no multiple of num_key_value_heads = {groups}"
    yield (
        config.qk_norm == "projection" and config.norm_type != "rms_norm",
        "qk_norm = 'projection' is an RMSNorm; set norm_type = 'rms_norm'",
    )
    widths = ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    given = [name for name in widths if getattr(config, name) is not None]
    if config.kv_lora_rank is None:
        yield bool(given) or config.q_lora_rank is not None, "latent attention needs kv_lora_rank"
        return
    yield len(given) < len(widths), f"latent attention needs {', '.join(widths)}"
    yield config.position_embedding_type != "rope", "latent attention needs position_embedding_type = 'rope'"
    yield config.rotated_share != 1.0, "with latent attention qk_rope_head_dim is what is rotated"
    yield groups != heads, "with latent attention every head has keys and values of its own"
    yield config.sliding_window is not None, "latent attention has no window; remove sliding_window"
    yield config.attention_sinks, "latent attention has no sinks; remove attention_sinks"
    yield config.qk_norm is not None, "latent attention has norms of its own; remove qk_norm"
    yield config.qkv_bias or config.use_bias, "latent attention has no biases"


def _dense_problems(config):
    for name, neutral in MOE_ONLY.items():
        value = getattr(config, name)
        yield value != neutral, f"{name} = {value!r} has no meaning without num_experts"


def _mixture_problems(config):
    experts, chosen, pattern = config.num_experts, config.num_experts_per_tok, config.moe_layer_pattern
    yield chosen > experts, f"num_experts_per_tok = {chosen} of num_experts = {experts}"
    yield (
        len(pattern) != config.num_hidden_layers or not set(pattern) <= {0, 1},
        f"moe_layer_pattern needs a 0 or a 1 for each of {config.num_hidden_layers} layers",
    )
    yield (
        config.scoring_func == "sigmoid" and config.softmax_before_topk,
        "softmax_before_topk has no meaning with sigmoid scores",
    )
    yield (
        config.weights_sum_to_one and config.norm_topk_prob is not None,
        "norm_topk_prob has no meaning after a softmax over the selected experts, which sums to 1",
    )
    yield (
        config.shared_expert_gate and config.shared_expert_intermediate_size is None,
        "shared_expert_gate needs shared_expert_intermediate_size",
    )
    groups, best = config.n_group, config.topk_group
    yield (groups is None) != (best is None), "n_group and topk_group belong together"
    if groups is not None and best is not None:
        fits = experts % groups == 0 and best <= groups and chosen <= best * (experts // groups)
        yield not fits, f"n_group = {groups} and topk_group = {best} do not fit {chosen} of {experts} experts"
        yield config.group_score == "top2_sum" and experts // groups < 2, "top2_sum needs two experts in a group"
    normalization, noise = config.gating_normalization, config.router_noise
    yield (
        normalization is not None and set(normalization) != {"scale", "eps", "correction"},
        f"gating_normalization = {normalization!r}: expected scale, eps and correction",
    )
    if noise is not None:
        expected = ROUTER_NOISE.get(noise.get("kind"))
        yield expected is None, f"router_noise: kind = {noise.get('kind')!r}: expected {', '.join(ROUTER_NOISE)}"
        yield (
            expected is not None and set(noise) != {"kind"} | expected,
            f"router_noise = {noise!r}: expected kind and {', '.join(expected or ()) or 'nothing else'}",
        )


def _tensor_parallel_plan(config):
    """Which linear layers an engine may split over devices, by columns or by rows."""
    plan = {}
    if config.kv_lora_rank is not None:
        queries = "q_proj" if config.q_lora_rank is None else "q_b_proj"
        plan |= dict.fromkeys((f"layers.*.self_attn.{name}" for name in (queries, "kv_b_proj")), "colwise")
        plan["layers.*.self_attn.o_proj"] = "rowwise"
    elif config.qk_norm != "projection" and not config.attention_sinks:  # which are of all heads
        plan |= dict.fromkeys((f"layers.*.self_attn.{name}_proj" for name in "qkv"), "colwise")
        plan["layers.*.self_attn.o_proj"] = "rowwise"
    networks = ["layers.*.mlp"] if not (config.num_experts and all(config.moe_layer_pattern)) else []
    networks += ["layers.*.mlp.experts.*"] if config.num_experts else []
    networks += ["layers.*.mlp.shared_expert"] if config.shared_expert_intermediate_size is not None else []
    for network in networks:
        plan |= {f"{network}.up_proj": "colwise", f"{network}.down_proj": "rowwise"}
        plan |= {f"{network}.gate_proj": "colwise"} if config.gated_mlp else {}
    return plan
