"""Checkpoints of other projects in and out: `python -m bipe_jax.convert --help`."""
