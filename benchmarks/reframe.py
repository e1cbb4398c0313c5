"""The cost of reframing in bytes, and its gain when a shard is resumed near its end.

python -m benchmarks.reframe --data='shards/*.jsonl.zst' [--text_mb=1000] [--level=3] [--rounds=9]

The lines of --data, repeated, make one shard of a single frame; it is reframed, and the document after
the last position but one is read from both. Positions are as in the training's state. The files are made
in a temporary directory and deleted.
"""

import argparse
import os
import statistics
import tempfile
import time

import zstandard

from bipe_jax import cli
from bipe_jax.config.spec import parse_source
from bipe_jax.data import shards, sources
from bipe_jax.data.reframe import reframe


def _write(spec: str, path: str, size: int, level: int) -> None:
    """One frame of about `size` bytes of text, in whole lines."""
    paths, written = shards.find(spec), 0
    compressor = zstandard.ZstdCompressor(level=level, write_checksum=True)
    with open(path, "wb") as file, compressor.stream_writer(file) as writer:
        while written < size:
            before = written
            for line, _ in (each for p in paths for each in shards.lines(p)):
                written += writer.write(line + b"\n")
                if written >= size:
                    return
            if written == before:
                raise sources.no_documents(spec)


def _seconds_to_resume(path: str, rounds: int) -> list[float]:
    """Opens the source and reads its last document, as a resumed run does."""
    places = [sources.files.START, sources.files.START]
    for _, place in sources.read_shard(path):
        places = [places[1], place]
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        document, place = next(sources.open_source(parse_source(path)).read(0, places[0]))
        seconds.append(time.perf_counter() - start)
        assert document["text"] and place == places[1]
    return seconds


def measure(spec: str, text_mb: float, level: int, rounds: int) -> None:
    with tempfile.TemporaryDirectory() as directory:
        single = os.path.join(directory, "shard.jsonl.zst")
        _write(spec, single, int(text_mb * 1e6), level)
        start = time.perf_counter()
        done = reframe(single, os.path.join(directory, "reframed"), level=level)
        took = time.perf_counter() - start
        reframed = os.path.join(directory, "reframed", "shard.jsonl.zst")
        print(
            f"{done['text'] / 1e6:,.0f} MB of text, level {level}: {done['frames']} frames, "
            f"{done['text'] / took / 1e6:.0f} MB/s on one core"
        )
        print(f"{'shard':12} {'bytes':>14} {'':>8} {'resume, ms':>12} {'min-max':>17}")
        for name, path, times in (
            ("one frame", single, max(rounds // 3, 1)),  # slow
            ("reframed", reframed, rounds),
        ):
            size = os.path.getsize(path)
            more = f"{size / done['before'] - 1:+.2%}"
            ms = sorted(1000 * s for s in _seconds_to_resume(path, times))
            between = f"{ms[0]:.1f}-{ms[-1]:.1f}"
            print(f"{name:12} {size:14,} {more:>8} {statistics.median(ms):12.1f} {between:>17}")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True)
    parser.add_argument("--text_mb", type=float, default=1000)
    parser.add_argument("--level", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    measure(args.data, args.text_mb, args.level, args.rounds)


if __name__ == "__main__":
    with cli.user_errors():
        main()
