"""Writes sequences that are not prose as JSONL shards with their segments.

python -m bipe_jax.modalities music --output=data/music
python -m bipe_jax.modalities proofs --output=data/proofs --references=relative

It says what they are made from, and under which licence. One document in ten, by a hash of its name, goes
into held-out.jsonl, the others into train-*.jsonl; data.json describes both. Nothing is downloaded: what is
not installed is named.
"""

from bipe_jax import cli, commands
from bipe_jax.modalities import registry, writing
from bipe_jax.modalities.documents import Options


def main() -> None:
    args = commands.parser("modalities").parse_args()
    modality = registry.find(args.name)
    options = Options(args.count, args.seed, args.references, args.plies)
    print(f"From {modality.source}\nLicence: {modality.licence}", flush=True)
    made = writing.write(args.name, options, args.output)
    of_part = [
        f"{sum(made['documents'][shard] for shard in shards):,} documents of "
        f"{sum(made['characters'][shard] for shard in shards):,} characters {where}"
        for shards, where in (
            ([name for name in made["documents"] if name != writing.HELD_OUT], "to train on"),
            ([writing.HELD_OUT], "held out"),
        )
    ]
    levels = " < ".join(made["levels"]) or "none"
    print(f"Version {made['version']}; {'; '.join(of_part)}; segments: {levels}")
    print(f"Wrote {writing.TRAIN}, {writing.HELD_OUT} and {writing.DESCRIPTION} in {args.output}")


if __name__ == "__main__":
    with cli.user_errors():
        main()
