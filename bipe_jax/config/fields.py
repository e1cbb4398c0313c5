"""The table of config fields: default, check, meaning and what each field fixes.

The table is written as frozen dataclasses, so that a parsed config has types. Everything else that is
said of a field (the defaults of configs/, the checks, docs/reference/config.md, how older checkpoints are
read) comes from here.
"""

import dataclasses
from typing import Any

from bipe_jax.config import checks

# What a field fixes, and so whether it may change when a run is resumed or fine-tuned from.
FREE = ""  # nothing: it may change at each start
DATA = "data"  # what is read: the same data may be named otherwise when a run is resumed
RUN = "run"  # the training: it must stay when a run is resumed
PARAMETERS = "parameters"  # what parameters mean: a run that starts from them must have it too

BACKENDS = ("splash", "cudnn", "chunked", "reference")
REMATS = ("none", "dots", "full")
OPTIMIZERS = ("adamw", "lion", "muon")
SCHEDULES = ("linear", "cosine", "wsd")
SPIKE_POLICIES = ("stop", "skip", "rewind")
PACKINGS = ("concat", "document", "row")
ON_ERROR = ("raise", "skip")
ON_CHANGE = ("refuse", "continue", "restart")


def _field(default: Any, check: checks.Check, meaning: str, fixes: str = FREE) -> Any:
    metadata = {"check": check, "meaning": meaning, "fixes": fixes}
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class Model:
    """The decoder."""

    layers: int = _field(12, checks.LISTED, "layers", PARAMETERS)
    width: int = _field(768, checks.COUNT, "width of the hidden states", PARAMETERS)
    heads: int = _field(12, checks.LISTED, "query heads; a head is width / heads wide", PARAMETERS)
    kv_heads: int = _field(
        12,
        checks.COUNT,
        "key/value heads; fewer than heads: grouped-query attention",
        PARAMETERS,
    )
    feed_forward: int = _field(3072, checks.COUNT, "hidden width of SwiGLU", PARAMETERS)
    vocab_size: int = _field(32000, checks.COUNT, "token ids; must be the tokenizer's", PARAMETERS)
    tied_output: bool = _field(
        False, checks.FLAG, "True: the output kernel is the embedding table", PARAMETERS
    )
    norm_epsilon: float = _field(1e-5, checks.POSITIVE, "of RMSNorm", PARAMETERS)
    qk_norm: bool = _field(
        False, checks.FLAG, "True: RMSNorm of the queries and keys of each head", PARAMETERS
    )
    logit_softcap: float = _field(
        0.0, checks.NOT_NEGATIVE, "c: logits z become c tanh(z / c); 0: they stay", PARAMETERS
    )
    dropout: float = _field(
        0.0,
        checks.BETA,
        "share of the embedding's numbers, and of those that attention and SwiGLU add, that training drops",
    )
    init_std: float = _field(
        0.02, checks.POSITIVE, "standard deviation of all matrices at the start", PARAMETERS
    )
    dtype: str = _field(
        "bfloat16",
        checks.Choice("bfloat16", "float32"),
        "compute dtype; parameters are always float32",
        RUN,
    )
    attention: str = _field(
        "auto",
        checks.Choice("auto", *BACKENDS),
        '"splash" (TPU), "cudnn" (NVIDIA), "chunked" or "reference"; "auto": the best for the platform',
    )
    remat: str = _field(
        "none",
        checks.Choice(*REMATS),
        'what the backward pass recomputes: "none", "dots" (all but matrix products) or "full" (layers)',
    )


@dataclasses.dataclass(frozen=True)
class Position:
    """Positional encodings: entries (kind, coordinate, (option, value), ...), see bipe_jax/positions."""

    absolute: tuple[Any, ...] = _field(
        (("learned", "offset"),), checks.ENTRIES, "encodings added to the token embedding", RUN
    )
    relative: tuple[Any, ...] = _field(
        (("rope", "segment"),), checks.ENTRIES, "encodings that act inside attention", RUN
    )
    draws: tuple[Any, ...] = _field(
        (),
        checks.ENTRIES,
        "coordinates that are drawn in training: entries (draw, coordinate, (option, value), ...)",
        RUN,
    )


@dataclasses.dataclass(frozen=True)
class Segments:
    """Where segments end."""

    rule: str = _field(
        "sentence",
        checks.TEXT,
        '"sentence", "newline", "newline-and-spaced-period" (the authors\'), "fixed:N" (N tokens each), '
        'or another of those in docs/reference/segments.md, such as "regex:PATTERN"',
        RUN,
    )
    levels: tuple[Any, ...] = _field(
        (),
        checks.LEVELS,
        "coarser levels, in ascending order: rules, or (name, rule), such as ('paragraph', 'chapter')",
        RUN,
    )


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """The SentencePiece tokenizer."""

    path: str = _field(
        "",
        checks.TEXT,
        'a SentencePiece .model, local or gs://; "": one is trained on the run\'s text',
    )
    train_bytes: int = _field(
        4_000_000, checks.COUNT, "bytes of text that a tokenizer is trained on, if it is"
    )


@dataclasses.dataclass(frozen=True)
class Data:
    """What is read, and how it becomes blocks."""

    train: str = _field(
        "quickstart:train",
        checks.TEXT,
        '"quickstart:train"; globs of .jsonl, .jsonl.gz, .jsonl.zst shards, separated by commas; '
        '"tfds:NAME[:SPLIT]"; "prepared:DIR"; "examples:GLOBS" of prompts and completions; '
        '"synthetic:NAME(OPTIONS)"; or "scrolls:DIR/TASK(OPTIONS)" (see docs/reference/data.md). "#A|B" '
        "after one keeps the sets A and B. A mixture is several of these with weights: "
        '"a/*.jsonl@0.7; b/*.jsonl@0.3"',
        DATA,
    )
    evaluation: str = _field(
        "quickstart:validation", checks.TEXT, "one source of held-out text, for the evaluation"
    )
    sets: tuple[str, ...] = _field(
        (), checks.NAMES, "keep only documents with these pile_set_names; (): all", RUN
    )
    shuffle_blocks: int = _field(
        4096,
        checks.COUNT,
        "blocks that are shuffled among each other (prepared data: all)",
        RUN,
    )
    packing: str = _field(
        "concat",
        checks.Choice(*PACKINGS),
        '"concat": documents are joined and cut into blocks; "document": none crosses a block\'s end; '
        '"row": one a block (or more, if it is longer), the rest of which is padding',
        RUN,
    )
    separate_documents: bool = _field(
        False, checks.FLAG, "True: attention and coordinates do not cross documents", RUN
    )
    cut_documents: str = _field(
        "restart",
        checks.Choice("restart", "continue"),
        "coordinates of a document that a block's end cuts restart or continue in the next block",
        RUN,
    )
    workers: int = _field(
        -1, checks.Number(int, low=-1), "threads that tokenise; -1: as many as there are cores"
    )
    on_error: str = _field(
        "raise",
        checks.Choice(*ON_ERROR),
        '"raise", or "skip" what is corrupt, cut short or unreadable',
    )
    on_change: str = _field(
        "refuse",
        checks.Choice(*ON_CHANGE),
        'if the training data have changed when a run resumes: "refuse"; "continue" to read shards of other '
        'content, such as repaired ones, from where the run was; or "restart" to read all from the start',
    )
    max_bad_share: float = _field(
        0.01,
        checks.FRACTION,
        "stop when a larger share of a shard's lines, or of the shards, is bad",
    )


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """The optimizer."""

    name: str = _field("adamw", checks.Choice(*OPTIMIZERS), '"adamw", "lion" or "muon"', RUN)
    learning_rate: float = _field(1e-4, checks.POSITIVE, "at the end of the warm-up")
    beta1: float = _field(0.9, checks.BETA, "decay of the first moment (muon: of its momentum)")
    beta2: float = _field(
        0.999,
        checks.BETA,
        "decay of the second moment (muon: of the Adam that serves tables and norms)",
    )
    epsilon: float = _field(1e-8, checks.POSITIVE, "added to the root of the second moment")
    weight_decay: float = _field(0.01, checks.NOT_NEGATIVE, "times the learning rate, a step")
    no_decay: tuple[str, ...] = _field(
        ("norm/scale", "relative/"),
        checks.NAMES,
        "parameters whose name contains one of these are not decayed",
    )
    clip_norm: float = _field(
        1.0, checks.NOT_NEGATIVE, "largest norm of a gradient; 0: no clipping"
    )


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The learning rate over the steps."""

    name: str = _field(
        "linear", checks.Choice(*SCHEDULES), '"linear", "cosine" or "wsd" (warm-up, stable, decay)'
    )
    warmup_steps: int = _field(100, checks.NATURAL, "steps of linear growth from 0")
    decay_steps: int = _field(0, checks.NATURAL, 'steps of linear decay at the end of "wsd"')
    final_fraction: float = _field(
        0.0, checks.FRACTION, "of the learning rate, approached at the end"
    )


@dataclasses.dataclass(frozen=True)
class Spikes:
    """What a run does at a step whose loss or gradient is not finite, or far above the usual."""

    threshold: float = _field(
        0.0,
        checks.NOT_NEGATIVE,
        "standard deviations above the running mean of the loss or the gradient's norm that make a step a "
        "spike, whose update is dropped; 0: only what is not finite",
    )
    policy: str = _field(
        "stop",
        checks.Choice(*SPIKE_POLICIES),
        '"stop" the run; "skip" the step; or "rewind" to the last checkpoint at a multiple of '
        "checkpoint.every and skip the data since then",
    )


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """When checkpoints are saved."""

    every: int = _field(1000, checks.COUNT, "steps between saves")
    keep: int = _field(
        3,
        checks.COUNT,
        "latest checkpoints that are kept, besides the last one that is proved good",
    )
    keep_every: int = _field(
        0,
        checks.NATURAL,
        "steps: checkpoints at its multiples are kept too; a multiple of `every`; 0: none",
    )
    keep_best: bool = _field(
        False,
        checks.FLAG,
        "True: the one with the lowest held-out loss at sequence_length is kept too; needs evaluation.every",
    )


@dataclasses.dataclass(frozen=True)
class Log:
    """What is logged, and where to."""

    every: int = _field(
        10, checks.COUNT, "steps between full lines in metrics.jsonl (each step has its loss)"
    )
    peak_flops: float = _field(
        0.0,
        checks.NOT_NEGATIVE,
        "FLOPs a second of one device, for MFU; 0: known for TPU and NVIDIA chips",
    )
    wandb: str = _field(
        "", checks.TEXT, 'project of Weights & Biases that the metrics go to as well; "": none'
    )


@dataclasses.dataclass(frozen=True)
class Mesh:
    """The axes of the device mesh, see bipe_jax/sharding.py."""

    devices: int = _field(
        0, checks.NATURAL, "of the whole run; another number is refused; 0: what is there"
    )
    data: int = _field(
        0,
        checks.NATURAL,
        "devices that the batch is sharded over, parameters replicated; 0: the rest",
    )
    fsdp: int = _field(
        1, checks.COUNT, "devices that the batch, the parameters and the optimizer are sharded over"
    )
    tensor: int = _field(
        1, checks.COUNT, "devices that heads, feed-forward width and vocabulary are sharded over"
    )
    context: int = _field(1, checks.COUNT, "devices that the length of a block is sharded over")
    topology: str = _field(
        "v5e:2x2", checks.TEXT, "the slice that bipe_jax.preflight compiles for by default"
    )


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The evaluation at the end of a run, and during it."""

    every: int = _field(
        0,
        checks.NATURAL,
        "steps between evaluations during training, at sequence_length and the next of `lengths` above it "
        "(or twice sequence_length); 0: none",
    )
    lengths: tuple[int, ...] = _field(
        (), checks.LENGTHS, "tokens; (): 1, 2, 4, 8, 16 times sequence_length"
    )
    context: int = _field(
        0,
        checks.NATURAL,
        "the largest length that may score the targets, in tokens; 0: the longest of `lengths`. Runs that "
        "are to be compared need the same",
    )
    tokens: int = _field(
        1 << 17, checks.NATURAL, "targets a data set, about, which each length scores; 0: all"
    )
    batch_tokens: int = _field(
        16384, checks.COUNT, "tokens that one forward pass holds (at least one window)"
    )


@dataclasses.dataclass(frozen=True)
class Config:
    """A run's config, checked. `config.parse` makes one."""

    steps: int = _field(1000, checks.COUNT, "optimizer steps in the whole run")
    batch_size: int = _field(32, checks.COUNT, "sequences a step, over all devices", RUN)
    sequence_length: int = _field(
        1024, checks.LENGTH, "tokens of a block that the model is trained on", RUN
    )
    seed: int = _field(
        0,
        checks.Number(
            int, low=0, high=2**31 - 1
        ),  # the shuffle adds the window's number, in 32 bits
        "of the parameters and of the order of the data",
        RUN,
    )
    initial_checkpoint: str = _field(
        "",
        checks.TEXT,
        "a new run starts from the parameters of this checkpoint (a run's workdir, or one step's "
        'directory), at step 0; positions and the segment rule may differ. "": from scratch',
    )
    accumulation: int = _field(
        1, checks.COUNT, "parts that a batch is computed in, one after the other, to save memory"
    )
    loss_chunk: int = _field(
        128,
        checks.COUNT,
        "tokens of each sequence whose logits are in memory at once; in training on TPUs more, if a device "
        "has fewer than 1024 tokens of them",
    )
    z_loss: float = _field(
        0.0,
        checks.NOT_NEGATIVE,
        "times the mean square of log(sum(exp(logits))): added to what is minimised, such as 1e-4",
    )
    model: Model = dataclasses.field(default_factory=Model)
    position: Position = dataclasses.field(default_factory=Position)
    segments: Segments = dataclasses.field(default_factory=Segments)
    tokenizer: Tokenizer = dataclasses.field(default_factory=Tokenizer)
    data: Data = dataclasses.field(default_factory=Data)
    optimizer: Optimizer = dataclasses.field(default_factory=Optimizer)
    schedule: Schedule = dataclasses.field(default_factory=Schedule)
    spikes: Spikes = dataclasses.field(default_factory=Spikes)
    checkpoint: Checkpoint = dataclasses.field(default_factory=Checkpoint)
    log: Log = dataclasses.field(default_factory=Log)
    mesh: Mesh = dataclasses.field(default_factory=Mesh)
    evaluation: Evaluation = dataclasses.field(default_factory=Evaluation)
