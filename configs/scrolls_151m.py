"""The fine-tuning of BiPE's authors on a data set of SCROLLS, --config=configs/scrolls_151m.py:TASK.

Rows of 8192 tokens, loss of the output and EOS alone, 5000 steps of 64 rows from a trained BiPE-RoPE, theirs
of step 500,000. SCROLLS' files are scrolls/TASK.zip.

python -m bipe_jax.train --config=configs/scrolls_151m.py:qasper --workdir=runs/qasper \\
  --config.initial_checkpoint=runs/bipe_rope_151m/checkpoints/500000
python -m bipe_jax.scrolls --checkpoint=runs/qasper --data=scrolls --tasks=qasper
"""

from typing import Any

from bipe_jax.config import file


def get_config(task: str = "gov_report"):
    c: Any = file.load("bipe_rope_151m")
    c.initial_checkpoint = "runs/bipe_rope_151m"
    c.steps = 5000
    c.batch_size = 64
    c.sequence_length = 8192
    c.model.remat = "full"
    c.data.train = f"scrolls:scrolls/{task}"
    c.data.packing = "row"
    c.optimizer.learning_rate = 1e-5
    c.optimizer.weight_decay = 0.01
    c.schedule.name = "linear"
    c.schedule.warmup_steps = 50
    c.checkpoint.every = 1000
    c.log.every = 10
    c.evaluation.lengths = (1024, 8192)  # of the Pile: what the fine-tuning costs
    return c
