"""python -m bipe_jax.checkpoint verify runs/quickstart: says of each checkpoint whether it is intact."""

from bipe_jax import cli
from bipe_jax.checkpoint import main

if __name__ == "__main__":
    with cli.user_errors():
        main()
