"""Conversion of checkpoints from and to other projects: `python -m bipe_jax.convert --help`."""
