"""The same decoder and train step in plain PyTorch, for comparing speeds: `step.py --torch=...`.

torch_check.py checks that it is the same. Variants:

eager    attention written out: the softmax of L x L logits, as in the code of BiPE's authors
sdpa     F.scaled_dot_product_attention: flash attention, but L x L biases for ALiBi
compile  torch.compile of "sdpa"

bfloat16 is by autocast with float32 parameters. Nothing is recomputed in the backward pass, whatever
`model.remat` is: where memory suffices this is PyTorch's fastest. The learning rate is constant,
the batch is computed in one part, and the output kernel is a parameter of its own.

Shape letters: B batch, L length, N query heads, K key/value heads, H head width, D width,
F feed-forward width, V vocabulary.
"""

import gc

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from bipe_jax.positions.alibi import alibi_slopes

VARIANTS = ("eager", "sdpa", "compile")


class RMSNorm(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(config.model.width))
        self.epsilon = config.model.norm_epsilon

    def forward(self, x):
        # The fused kernel takes one dtype, sums in float32 by itself, and is not for autocast to cast.
        with torch.autocast(x.device.type, enabled=False):
            return F.rms_norm(x, self.scale.shape, self.scale.to(x.dtype), self.epsilon)


def rotate(x, cos, sin):
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class Attention(nn.Module):
    def __init__(self, config, written_out: bool):
        super().__init__()
        m = config.model
        self.heads, self.groups = m.heads + m.kv_heads, m.heads // m.kv_heads
        self.sizes = (m.heads, m.kv_heads)
        self.head_width = m.width // m.heads
        self.qkv = nn.Linear(m.width, (self.heads + m.kv_heads) * self.head_width, bias=False)
        self.output = nn.Linear(m.width, m.width, bias=False)
        self.written_out = written_out

    def forward(self, x, turn, bias):
        B, L, D = x.shape
        qkv = self.qkv(x).view(B, L, -1, self.head_width).transpose(1, 2)
        qk, v = qkv[:, : self.heads], qkv[:, self.heads :]
        q, k = (qk if turn is None else rotate(qk, *turn)).split(self.sizes, dim=1)
        mixed = self.attend(q, k, v, bias)
        return self.output(mixed.transpose(1, 2).reshape(B, L, D))

    def attend(self, q, k, v, bias):
        if not self.written_out:
            options = {"is_causal": True} if bias is None else {"attn_mask": bias}
            return F.scaled_dot_product_attention(q, k, v, enable_gqa=self.groups > 1, **options)
        if self.groups > 1:
            k, v = (x.repeat_interleave(self.groups, dim=1) for x in (k, v))
        logits = q @ k.transpose(-2, -1) * self.head_width**-0.5 + bias
        return logits.softmax(dim=-1, dtype=torch.float32).to(v.dtype) @ v


class FeedForward(nn.Module):
    def __init__(self, config):
        super().__init__()
        D, hidden = config.model.width, config.model.feed_forward
        self.gate_up = nn.Linear(D, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, D, bias=False)

    def forward(self, x):
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class Layer(nn.Module):
    def __init__(self, config, written_out):
        super().__init__()
        self.attention_norm, self.feed_forward_norm = RMSNorm(config), RMSNorm(config)
        self.attention = Attention(config, written_out)
        self.feed_forward = FeedForward(config)

    def forward(self, x, turn, bias):
        x = x + self.attention(self.attention_norm(x), turn, bias)
        return x + self.feed_forward(self.feed_forward_norm(x))


class Decoder(nn.Module):
    """`inputs`: (B, L) integers by name, as in bipe_jax.model."""

    def __init__(self, config, written_out: bool):
        super().__init__()
        m = config.model
        if m.tied_output:
            raise ValueError("the PyTorch decoder has no model.tied_output")
        self.written_out = written_out
        self.dtype = getattr(torch, m.dtype)
        self.embed = nn.Embedding(m.vocab_size, m.width)
        self.layers = nn.ModuleList(Layer(config, written_out) for _ in range(m.layers))
        self.norm = RMSNorm(config)
        self.output = nn.Linear(m.width, m.vocab_size, bias=False)
        self.tables = nn.ModuleDict()  # of learned absolute encodings, by coordinate
        self.sines = self.rope = self.alibi = None  # the coordinate that each acts on
        for entry in config.encodings.absolute:
            if entry.kind == "learned":
                rows = entry.options.get("size", config.sequence_length)
                self.tables[entry.coordinate] = nn.Embedding(rows, m.width)
            else:
                self.sines = entry.coordinate
                self.sines_scale = entry.options.get("scale", m.init_std)
                self._frequencies("sines_frequencies", entry, m.width)
        for entry in config.encodings.relative:
            if entry.kind == "rope":
                self.rope = entry.coordinate
                self._frequencies("rope_frequencies", entry, m.width // m.heads)
            else:
                self.alibi = entry.coordinate
                slopes = entry.options.get("slope_scale", 1.0) * alibi_slopes(m.heads)
                self.register_buffer("slopes", torch.tensor(slopes, dtype=torch.float32))
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=m.init_std)

    def _frequencies(self, name, entry, width):
        values = entry.options.get("theta", 10000.0) ** (-np.arange(0, width, 2) / width)
        self.register_buffer(name, torch.tensor(values, dtype=torch.float32))

    def bias(self, inputs):
        """Biases (B or 1, N or 1, L, L) with the causal mask; None where there is no other bias."""
        if self.alibi is None and not self.written_out:
            return None
        L = inputs["tokens"].shape[1]
        bias = torch.full((L, L), -torch.inf, device=inputs["tokens"].device).triu(1)
        if self.alibi is not None:
            at = inputs[self.alibi][: 1 if self.alibi == "position" else None]
            distance = (at[:, None, :, None] - at[:, None, None, :]).float()
            bias = bias - self.slopes[:, None, None] * distance
        return bias.to(self.dtype)

    def logits(self, inputs):
        x = self.embed(inputs["tokens"])
        for coordinate, table in self.tables.items():
            x = x + table(inputs[coordinate].clamp(max=table.num_embeddings - 1))
        if self.sines is not None:
            angles = inputs[self.sines][..., None] * self.sines_frequencies
            x = x + self.sines_scale * torch.cat((angles.sin(), angles.cos()), dim=-1)
        x = x.to(self.dtype)
        turn = None
        if self.rope is not None:
            angles = inputs[self.rope][:, None, :, None] * self.rope_frequencies
            turn = angles.cos().to(self.dtype), angles.sin().to(self.dtype)
        bias = self.bias(inputs)
        for layer in self.layers:
            x = layer(x, turn, bias)
        return self.output(self.norm(x))

    def forward(self, inputs):
        """The mean loss over all targets."""
        return F.cross_entropy(self.logits(inputs).flatten(0, 1), inputs["targets"].flatten())


def to_torch(batch: dict, device: str) -> dict:
    """An annotated batch (NumPy) for the decoder."""
    return {k: torch.from_numpy(np.array(v)).long().to(device) for k, v in batch.items()}


def make_step(config, decoder: Decoder, variant: str):
    """A function of the inputs that makes one update and returns the loss and the gradients' norm."""
    o = config.optimizer
    if o.name != "adamw":
        raise ValueError(f"the PyTorch train step has no optimizer.name={o.name!r}")
    parameters = list(decoder.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": o.weight_decay},
        {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
    ]
    betas = (o.beta1, o.beta2)
    optimizer = torch.optim.AdamW(groups, o.learning_rate, betas, o.epsilon, fused=True)
    loss_of = decoder
    if variant == "compile":
        # All encodings and lengths share one function, which would soon have too many versions.
        torch._dynamo.config.recompile_limit = 1000
        loss_of = torch.compile(decoder, fullgraph=True, dynamic=False)
    device = parameters[0].device.type

    def run(inputs):
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device, torch.bfloat16, enabled=config.model.dtype == "bfloat16"):
            loss = loss_of(inputs)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(parameters, o.clip_norm or torch.inf)
        optimizer.step()
        return loss.detach(), norm

    return run


def build(config, variant: str, batch: dict, steps: int, device: str):
    """A function that runs some steps and waits for them, and the bytes allocated at the peak."""
    on_gpu = device == "cuda"
    if on_gpu:  # as JAX does there
        torch.set_float32_matmul_precision("high")
        torch.cuda.reset_peak_memory_stats()
        others = torch.cuda.memory_allocated()
    with torch.device(device):
        decoder = Decoder(config, written_out=variant == "eager")
    step, inputs = make_step(config, decoder, variant), to_torch(batch, device)

    def run():
        for _ in range(steps):
            step(inputs)
        if on_gpu:
            torch.cuda.synchronize()

    run()
    return run, torch.cuda.max_memory_allocated() - others if on_gpu else None


def forget() -> None:
    """Drops the programs of torch.compile, and its count of versions of one function."""
    torch._dynamo.reset()


def release() -> None:
    """Frees memory that no model uses any more."""
    gc.collect()
    torch.cuda.empty_cache()
