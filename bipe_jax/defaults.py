"""Every field of a run, with its meaning and unit. configs/base.py, and so all configs, start here.

On the command line any field can be set: --config.optimizer.learning_rate=3e-4
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    c = ConfigDict()

    # Scripts may rely on these four.
    c.steps = 1000  # optimizer steps in the whole run
    c.batch_size = 32  # sequences a step, over all devices
    c.sequence_length = 1024  # tokens of a block that the model is trained on
    c.seed = 0  # of the parameters and of the order of the data

    # A new run starts from the parameters of this checkpoint (a run's workdir, or one step's
    # directory), at step 0; positions and the segment rule may differ. "": from scratch.
    c.initial_checkpoint = ""
    c.accumulation = 1  # parts that a batch is computed in, one after the other, to save memory
    c.loss_chunk = 128  # tokens of each sequence whose logits are held at once

    c.model = ConfigDict()
    c.model.layers = 12
    c.model.width = 768
    c.model.heads = 12  # query heads; a head is width / heads wide
    c.model.kv_heads = 12  # key/value heads; fewer than heads: grouped-query attention
    c.model.feed_forward = 3072  # hidden width of SwiGLU
    c.model.vocab_size = 32000  # must be the tokenizer's
    c.model.tied_output = False  # True: the output kernel is the embedding table
    c.model.norm_epsilon = 1e-5  # of RMSNorm
    c.model.init_std = 0.02  # standard deviation of all matrices at the start
    c.model.dtype = "bfloat16"  # compute dtype, or "float32"; parameters are always float32
    # "splash" (TPU), "cudnn" (NVIDIA), "chunked", "reference"; "auto": the best for the platform.
    c.model.attention = "auto"
    # Recomputed in the backward pass: "none", "dots" (all but matrix products) or "full" (layers).
    c.model.remat = "none"

    # Entries (kind, coordinate, (option, value), ...): see bipe_jax/positions. This is BiPE-RoPE.
    c.position = ConfigDict()
    c.position.absolute = (("learned", "offset"),)  # added to the token embedding
    c.position.relative = (("rope", "segment"),)  # acts inside attention

    c.segments = ConfigDict()
    # "sentence", "newline", "newline-and-spaced-period" (the authors'), "fixed:N" (N tokens each).
    c.segments.rule = "sentence"
    c.segments.separators = ()  # ids of tokens that end a segment; filled in from the tokenizer

    c.tokenizer = ConfigDict()
    # A SentencePiece .model, local or gs://; "": one is trained on the run's own text.
    c.tokenizer.path = ""
    c.tokenizer.train_bytes = 4_000_000  # text that it is trained on, if it is

    c.data = ConfigDict()
    # "quickstart:train"; globs of .jsonl, .jsonl.gz, .jsonl.zst shards, separated by commas;
    # "tfds:NAME[:SPLIT]"; or "prepared:DIR" (see bipe_jax/data/prepare.py). "#A|B" behind one keeps the
    # sets A and B. A mixture is several of these with weights: "a/*.jsonl@0.7; b/*.jsonl@0.3".
    c.data.train = "quickstart:train"
    c.data.evaluation = "quickstart:validation"  # the same, for the evaluation at the end
    c.data.sets = ()  # keep only documents with these pile_set_names; (): all
    c.data.shuffle_blocks = 4096  # blocks that are shuffled among each other (prepared data: all)
    # "concat": documents are joined and cut into blocks; "document": none crosses a block's end.
    c.data.packing = "concat"
    c.data.separate_documents = False  # True: attention and coordinates do not cross documents
    # Coordinates of a document that a block's end cuts "restart" or "continue" in the next block.
    c.data.cut_documents = "restart"
    c.data.workers = -1  # threads that tokenise; -1: as many as there are cores
    c.data.on_error = "raise"  # or "skip" what is corrupt, cut short or unreadable
    c.data.max_bad_share = 0.01  # stop when more of a shard's lines, or of the shards, are bad

    c.optimizer = ConfigDict()
    c.optimizer.name = "adamw"  # or "lion", "muon"
    c.optimizer.learning_rate = 1e-4  # at the end of the warm-up
    c.optimizer.beta1 = 0.9  # (muon: of its momentum)
    c.optimizer.beta2 = 0.999  # (muon: of the Adam that serves tables and norms)
    c.optimizer.epsilon = 1e-8
    c.optimizer.weight_decay = 0.01  # times the learning rate, a step
    c.optimizer.no_decay = (
        "norm/scale",
    )  # parameters whose name holds one of these are not decayed
    c.optimizer.clip_norm = 1.0  # largest norm of a gradient; 0: no clipping

    c.schedule = ConfigDict()
    c.schedule.name = "linear"  # or "cosine", "wsd" (warm-up, stable, decay)
    c.schedule.warmup_steps = 100  # of linear growth from 0
    c.schedule.decay_steps = 0  # of linear decay at the end of "wsd"
    c.schedule.final_fraction = 0.0  # of the learning rate, approached at the end

    c.spikes = ConfigDict()
    # A step whose loss or gradient is not finite, or so many standard deviations above its running
    # mean, is a spike and changes no parameter; 0: only what is not finite.
    c.spikes.threshold = 0.0
    # Then "stop" the run; "skip" the step and go on; or "rewind" to the last checkpoint and go on with
    # the data behind the spike.
    c.spikes.policy = "stop"

    c.checkpoint = ConfigDict()
    c.checkpoint.every = 1000  # steps
    c.checkpoint.keep = 3  # latest checkpoints that are kept

    c.log = ConfigDict()
    c.log.every = 10  # steps between full lines in metrics.jsonl (loss is there for every step)
    c.log.peak_flops = 0.0  # of one device, a second, for MFU; 0: known for TPU and NVIDIA chips
    c.log.wandb = ""  # project of Weights & Biases that the metrics go to as well; "": none

    c.mesh = ConfigDict()
    c.mesh.devices = 0  # of the whole run, over all processes: others are refused; 0: what is there
    c.mesh.data = 0  # devices that the batch is cut over, with all parameters; 0: the rest
    c.mesh.fsdp = 1  # devices that the batch, the parameters and the optimizer are cut over
    c.mesh.tensor = 1  # devices that heads, feed-forward width and vocabulary are cut over
    c.mesh.context = 1  # devices that the length of a block is cut over
    c.mesh.topology = (
        "v5e:2x2"  # the slice that the config is meant for, as bipe_jax.preflight says it
    )

    c.evaluation = ConfigDict()
    # Steps between evaluations during training, at sequence_length and the next of `lengths` above it (or
    # twice sequence_length); 0: none.
    c.evaluation.every = 0
    c.evaluation.lengths = ()  # tokens; (): 1, 2, 4, 8, 16 times sequence_length
    c.evaluation.windows = 128  # target windows a data set, of the shortest length each
    c.evaluation.batch_tokens = 16384  # tokens that one forward pass holds (at least one window)
    return c
