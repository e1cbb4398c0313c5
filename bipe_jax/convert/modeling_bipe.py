"""BiPE language models for transformers: a Llama-like decoder with any positional encodings.

bipe_jax writes this file to the directory of the weights:

model = AutoModelForCausalLM.from_pretrained(DIRECTORY, trust_remote_code=True)

An encoding is a *kind* (learned, sinusoidal, rope, alibi) applied to a *coordinate* of each token:
`position`, its index without counting padding; `segment`, the number of separators before it; `offset`,
its index in its segment. Coordinates are computed from the tokens, also in generation: the cache contains
the tokens besides keys and values, so that reordering beams or cropping applies to both.

Shape letters: B batch, L new tokens, S new and cached tokens, N heads, H head width, D model width.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F
from transformers import DynamicCache, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

# The cache's name in generation, which transformers 5.24 changed.
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


class BipeConfig(PretrainedConfig):
    """The config, with the names of Llama's and these attributes.

    Attributes:
      absolute_encodings, relative_encodings: dicts with "kind", "coordinate" and the kind's options.
      segment_separators: ids of the tokens that end a segment.
      segment_length: if above 0, the length of all segments, instead of separators.
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
        segment_separators=(),
        segment_length=0,
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
        self.segment_separators = list(segment_separators)
        self.segment_length = segment_length
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)


def coordinates_of(tokens, real, separators, length):
    """The coordinates of every token of whole texts.

    Args:
      tokens: (B, S). real: (B, S) booleans, False for padding, which is not counted.
      separators, length: see `BipeConfig`.

    Returns:
      "position", "segment", "offset", each (B, S) int64; undefined for padding.
    """
    position = (real.cumsum(-1) - 1).clamp(min=0)
    if length:
        ends = position % length == length - 1
    else:
        ends = torch.isin(tokens, torch.tensor(separators, device=tokens.device))
    ends &= real
    segment = ends.cumsum(-1) - ends.long()
    after_end = (ends * (position + 1)).cummax(-1).values
    first = F.pad(after_end, (1, -1))  # position of the first token of each segment
    return {"position": position, "segment": segment, "offset": (position - first).clamp(min=0)}


def learned(table, coordinate, entry):
    """Rows of a table. Beyond the table, the last row; for `position`, an error."""
    rows = table.num_embeddings
    if entry["coordinate"] == "position" and coordinate.max() >= rows:
        raise ValueError(
            f"the learned table of position ends at {rows} tokens: the model has nothing for "
            f"{int(coordinate.max()) + 1} tokens"
        )
    return table(coordinate.clamp(max=rows - 1)).float()


def sinusoidal(width, coordinate, entry):
    """Sines in the first half, cosines in the second: (B, L) -> (B, L, D) float32."""
    exponents = -torch.arange(0, width, 2, dtype=torch.float64) / width
    frequencies = (entry["theta"] ** exponents).float().to(coordinate.device)
    angles = coordinate[..., None].float() * frequencies
    return entry["scale"] * torch.cat([angles.sin(), angles.cos()], dim=-1)


def rope_frequencies(width, seen, entry):
    """Angles of the pairs of a head per unit of the coordinate, and the magnitude of the rotation.

    Args:
      width: H. seen: (B, 1, 1, 1) float64 on the CPU, the coordinate's largest value plus 1.
      entry: "theta" and, with scaling, "scaling", "factor" and "original".

    Returns:
      (H/2,) float64, with "dynamic-ntk" (B, 1, 1, H/2); the magnitude.
    """
    theta, scaling, factor = entry["theta"], entry.get("scaling", ""), entry.get("factor")
    pairs = torch.arange(width // 2, dtype=torch.float64)
    frequencies = theta ** (-2 * pairs / width)
    if not scaling:
        return frequencies, 1.0
    if scaling == "linear":
        return frequencies / factor, 1.0
    if scaling == "ntk":
        return frequencies * factor ** (-pairs / (width // 2 - 1)), 1.0
    original = entry["original"]
    if scaling == "dynamic-ntk":
        stretch = 1 + factor * (seen - original).clamp(min=0) / original
        return frequencies * stretch ** (-pairs / (width // 2 - 1)), 1.0
    if scaling == "yarn":  # Peng et al. 2023: NTK by parts, and a temperature
        turns = original * frequencies / (2 * math.pi)
        unscaled = ((turns - 1) / 31).clamp(0, 1)
        return (1 - unscaled) * frequencies / factor + unscaled * frequencies, 0.1 * math.log(
            factor
        ) + 1
    raise ValueError(f"the rope scaling {scaling!r} is unknown to modeling_bipe.py")


def rotation_of(width, coordinate, real, new, entry):
    """Cosines and sines of the last `new` of all coordinates (B, S), (B, 1, L, H/2) float32 each."""
    seen = coordinate.masked_fill(~real, 0).amax(-1)[:, None, None, None] + 1
    frequencies, magnitude = rope_frequencies(width, seen.cpu().double(), entry)
    angles = coordinate[:, None, -new:, None].float() * frequencies.float().to(coordinate.device)
    return magnitude * angles.cos(), magnitude * angles.sin()


def turn(x, cos, sin):
    """Rotates the pairs (i, i + H/2) of x, (B, N, L, H), in float32."""
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


def alibi_slopes(heads):
    """Press et al. 2022: 2^(-8i/N), with the released code's rule where N is no power of two."""
    below = 2 ** math.floor(math.log2(heads))
    slopes = [2.0 ** (-8.0 * i / below) for i in range(1, below + 1)]
    return slopes + [2.0 ** (-4.0 * i / below) for i in range(1, 2 * (heads - below), 2)]


def alibi(heads, coordinate, new, entry):
    """-slope * (coordinate of the query - that of the key): (B, S) -> (B, N, L, S) float32."""
    distance = (coordinate[:, -new:, None] - coordinate[:, None, :]).float()
    slopes = entry["slope_scale"] * torch.tensor(alibi_slopes(heads), dtype=torch.float64)
    return -slopes.float().to(coordinate.device)[:, None, None] * distance[:, None]


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
    def __init__(self, config):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.hidden_size))
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

    def forward(self, x, rotation, mask, cache):
        B, L, D = x.shape
        q, k, v = (
            project(x).view(B, L, -1, self.head_width).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
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
        self.input_layernorm = BipeRMSNorm(config)
        self.self_attn = BipeAttention(config, layer)
        self.post_attention_layernorm = BipeRMSNorm(config)
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
        self.norm = BipeRMSNorm(config)
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
        coordinates = coordinates_of(tokens, real, config.segment_separators, config.segment_length)
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
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs
            )
        result = CausalLMOutputWithPast(
            loss=loss, logits=logits, **{CACHE: getattr(outputs, CACHE)}
        )
        return result.to_tuple() if return_dict is False else result
