"""BiPE language models for transformers: a Llama-like decoder with any positional encodings.

bipe_jax writes this file to the directory of the weights:

model = AutoModelForCausalLM.from_pretrained(DIRECTORY, trust_remote_code=True)

Encodings (`positions_bipe.py`) apply to coordinates of the tokens: `position`, the index without counting
padding; `segment`, the number of the segment; `offset`, the index there; and those of coarser levels
(`segments_bipe.py`). They are computed from the tokens, also in generation: the cache contains the tokens
besides keys and values, so that reordering beams or cropping applies to both.

Shape letters: B batch, L new tokens, S new and cached tokens, N heads, H head width, D model width.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F
from transformers import DynamicCache, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from .positions_bipe import alibi, learned, rotation_of, sinusoidal, turn
from .segments_bipe import coordinates_of

# The cache's name in generation, which transformers 5.24 changed.
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


class BipeConfig(PretrainedConfig):
    """The config, with the names of Llama's and these attributes.

    Attributes:
      absolute_encodings, relative_encodings: dicts with "kind", "coordinate" and the kind's options.
      segment_rule: where segments end, see `segments_bipe.py`.
      qk_norm: whether queries and keys are normalised, as in Qwen3.
      final_logit_softcapping: c, if logits z are c tanh(z / c), as in Gemma 2, or None.
    """

    model_type = "bipe_jax"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]

    def __init__(
        self,
        vocab_size=32000,
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=None,
        rms_norm_eps=1e-5,
        initializer_range=0.02,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
        absolute_encodings=(),
        relative_encodings=(),
        segment_rule=None,
        qk_norm=False,
        final_logit_softcapping=None,
        **kwargs,
    ):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads or num_attention_heads
        self.rms_norm_eps = rms_norm_eps
        self.initializer_range = initializer_range
        self.max_position_embeddings = max_position_embeddings
        self.absolute_encodings = list(absolute_encodings)
        self.relative_encodings = list(relative_encodings)
        self.segment_rule = segment_rule or {}
        self.qk_norm = qk_norm
        self.final_logit_softcapping = final_logit_softcapping
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)


def mask_of(real, new, bias):
    """The attention mask of the last `new` of all tokens.

    Args:
      real: (B, S), False for padding. bias: (B, N, L, S) float32, or None.

    Returns:
      The bias with -inf where attention is masked; without a bias (B, 1, L, S) booleans, or None if the
      mask is causal only.
    """
    size = real.shape[-1]
    if bias is None and new in (1, size) and bool(real.all()):
        return None
    key = torch.arange(size, device=real.device)
    query = key[size - new :, None]
    # Padding attends to itself: a fully masked row would be NaN.
    visible = ((key < query) & real[:, None, :] | (key == query))[:, None]
    return visible if bias is None else bias.masked_fill(~visible, -math.inf)


class BipeRMSNorm(nn.Module):
    def __init__(self, config, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.epsilon = config.rms_norm_eps

    def forward(self, x):
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.epsilon)
        return (y * self.weight.float()).to(x.dtype)


class BipeAttention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.layer = layer
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        width, self.head_width = config.hidden_size, config.hidden_size // self.heads
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, self.kv_heads * self.head_width, bias=False)
        self.v_proj = nn.Linear(width, self.kv_heads * self.head_width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)
        self.normalises = config.qk_norm
        if config.qk_norm:
            self.q_norm = BipeRMSNorm(config, self.head_width)
            self.k_norm = BipeRMSNorm(config, self.head_width)

    def forward(self, x, rotation, mask, cache):
        B, L, D = x.shape
        q, k, v = (
            project(x).view(B, L, -1, self.head_width).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.normalises:
            q, k = self.q_norm(q), self.k_norm(k)
        if rotation is not None:
            q, k = turn(q, *rotation), turn(k, *rotation)
        if cache is not None:
            k, v = cache.update(k, v, self.layer)
        group = self.heads // self.kv_heads
        k, v = (y.repeat_interleave(group, dim=1) if group > 1 else y for y in (k, v))
        causal = mask is None and L > 1
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
        return self.o_proj(y.transpose(1, 2).reshape(B, L, D))


class BipeMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class BipeLayer(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.input_layernorm = BipeRMSNorm(config, config.hidden_size)
        self.self_attn = BipeAttention(config, layer)
        self.post_attention_layernorm = BipeRMSNorm(config, config.hidden_size)
        self.mlp = BipeMLP(config)

    def forward(self, x, rotation, mask, past_key_values):
        x = x + self.self_attn(self.input_layernorm(x), rotation, mask, past_key_values)
        return x + self.mlp(self.post_attention_layernorm(x))


class BipePreTrainedModel(PreTrainedModel):
    config_class = BipeConfig
    base_model_prefix = "model"
    _no_split_modules = ["BipeLayer"]
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _supports_sdpa = True


class BipeModel(BipePreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embeds = nn.ModuleList(
            nn.Embedding(entry["size"], config.hidden_size)
            for entry in config.absolute_encodings
            if entry["kind"] == "learned"
        )
        self.layers = nn.ModuleList(BipeLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = BipeRMSNorm(config, config.hidden_size)
        self.post_init()

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        use_cache=False,
    ):
        """The hidden states; see `BipeForCausalLM.forward`."""
        config = self.config
        if input_ids is None or inputs_embeds is not None:
            raise ValueError("give input_ids: coordinates follow from tokens, not from embeddings")
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=config)
        new = input_ids.shape[1]
        tokens, real = self._all_tokens(input_ids, attention_mask, past_key_values)
        coordinates = coordinates_of(tokens, real, config.segment_rule)
        if position_ids is not None:
            differs = (position_ids != coordinates["position"][:, -new:]) & real[:, -new:]
            if bool(differs.any()):
                raise ValueError(
                    "position_ids must count the tokens that are no padding, as by default: texts "
                    "that are packed into one row are not separated"
                )

        x = self.embed_tokens(input_ids)
        tables, dtype = iter(self.embeds), x.dtype
        for entry in config.absolute_encodings:
            coordinate = coordinates[entry["coordinate"]][:, -new:]
            if entry["kind"] == "learned":
                x = x.float() + learned(next(tables), coordinate, entry)
            else:
                x = x.float() + sinusoidal(config.hidden_size, coordinate, entry)
        x = x.to(dtype)

        heads, rotation, bias = config.num_attention_heads, None, None
        for entry in config.relative_encodings:
            coordinate = coordinates[entry["coordinate"]]
            if entry["kind"] == "rope":
                width = config.hidden_size // heads
                rotation = rotation_of(width, coordinate, real, new, entry)
            else:
                term = alibi(heads, coordinate, new, entry)
                bias = term if bias is None else bias + term
        mask = mask_of(real, new, bias)
        if mask is not None and bias is not None:
            mask = mask.to(dtype)
        for layer in self.layers:
            x = layer(x, rotation, mask, past_key_values=past_key_values)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(x), **{CACHE: past_key_values})

    def _all_tokens(self, input_ids, attention_mask, cache):
        """Adds the new tokens to the cache; returns all tokens, and False for padding, (B, S) each.

        They are in a layer of the cache after the decoder's, as keys and values of one head of width 1.
        """
        layer = None if cache is None else self._token_layer(cache)
        before = 0 if layer is None else layer.get_seq_length()
        shape = (input_ids.shape[0], before + input_ids.shape[1])
        if attention_mask is None:
            real = torch.ones_like(input_ids, dtype=torch.bool)
        elif attention_mask.shape == shape:
            real = attention_mask[:, before:].bool()
        else:
            raise ValueError(
                f"attention_mask is {tuple(attention_mask.shape)}, but input_ids and the tokens in the "
                f"cache are together {shape}: give 1, and 0 for padding, for each of them"
            )
        tokens = input_ids
        if layer is not None:
            cached = layer.update(input_ids[:, None, :, None], real[:, None, :, None])
            tokens, real = (x[:, 0, :, 0] for x in cached)
            real = real.bool()  # one type for keys and values
        return tokens, real if attention_mask is None else attention_mask.bool()

    def _token_layer(self, cache):
        if not isinstance(cache, DynamicCache) or cache.offloading:
            raise ValueError(
                "only a DynamicCache that is not offloaded can hold the segments' state"
            )
        if any(e.get("scaling") == "dynamic-ntk" for e in self.config.relative_encodings):
            raise ValueError(
                "with rope scaling 'dynamic-ntk' all keys change with the length and cannot be "
                "cached: use use_cache=False"
            )
        size = self.config.num_hidden_layers
        while len(cache.layers) <= size:
            cache.layers.append(DynamicLayer())
        return cache.layers[size]


class BipeForCausalLM(BipePreTrainedModel, GenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config):
        super().__init__(config)
        self.model = BipeModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        labels=None,
        use_cache=False,
        logits_to_keep=0,
        output_attentions=None,
        output_hidden_states=None,
        return_dict=None,
        cache=None,
        **kwargs,
    ):
        """Logits, and the loss if there are labels.

        Args:
          input_ids: (B, L).
          attention_mask: (B, S), 0 for padding, on either side; includes the cached tokens.
          position_ids: only checked, since coordinates are computed from the tokens.
          past_key_values, cache: a DynamicCache, by either name; the new tokens are added to it.
          inputs_embeds: not supported.
          labels: (B, L) as in Llama, -100 for tokens without loss; shifted by one here.
          use_cache: returns a new cache if none is passed.
          logits_to_keep: the number of last tokens with logits, if above 0, or their indices.
          output_attentions, output_hidden_states: not supported.
          **kwargs: of the loss, such as num_items_in_batch.
        """
        if output_attentions or output_hidden_states:
            raise ValueError("this model gives neither attentions nor hidden states of its layers")
        past = past_key_values if cache is None else cache
        outputs = self.model(
            input_ids, attention_mask, position_ids, past, inputs_embeds, use_cache
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept, :])
        if cap := self.config.final_logit_softcapping:
            logits = cap * torch.tanh(logits / cap)
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs
            )
        result = CausalLMOutputWithPast(
            loss=loss, logits=logits, **{CACHE: getattr(outputs, CACHE)}
        )
        return result.to_tuple() if return_dict is False else result
