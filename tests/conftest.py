"""A small corpus of real text and a tokenizer trained on it, shared by all tests."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import xla_flags
from paths import ROOT

if "BIPE_AS_USERS" not in os.environ:
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {xla_flags.QUICK}"

import jax
import pytest

from bipe_jax import cli
from bipe_jax.config.spec import parse_source
from bipe_jax.data import sources, tokenizer

VOCAB_SIZE = 512
collect_ignore = [] if "BIPE_AS_USERS" in os.environ else ["numerics"]


def pytest_collection_modifyitems(items):
    """Leaves out what is marked as slow, unless BIPE_SLOW=1."""
    if "BIPE_SLOW" not in os.environ:
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="takes a while: set BIPE_SLOW=1"))


@pytest.fixture(scope="session", autouse=True)
def compilation_cache(tmp_path_factory):
    """What is compiled once is not compiled again, here, in other workers and in processes that tests start.

    The directory is a part of JAX's keys, and must therefore be the same for all workers.
    """
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    directory = str(shared / "compilation_cache")
    settings = {
        "jax_compilation_cache_dir": directory,
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": 0,
    }
    for name, value in settings.items():
        jax.config.update(name, value)
        os.environ[name.upper()] = str(value)


@pytest.fixture(scope="session", autouse=True)
def messages():
    """Are shown as by the commands."""
    cli.log_to_terminal()


@pytest.fixture(autouse=True)
def signal_handlers():
    """A test's handlers end with it: a training leaves handlers that are not Python's own in place."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """The beginnings of the quickstart's documents, some characters longer from one to the next."""
    documents = sources.documents(parse_source("quickstart:train"))
    return [d["text"][: 3000 + 100 * i] for i, d in zip(range(40), documents, strict=False)]


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory, texts) -> str:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    path.write_bytes(tokenizer.train(texts, VOCAB_SIZE, 200_000).model)
    return str(path)


@pytest.fixture(scope="session")
def shards(tmp_path_factory, texts) -> str:
    """A glob of two Pile-format shards."""
    directory = tmp_path_factory.mktemp("shards")
    for shard in range(2):
        with open(directory / f"{shard}.jsonl", "w") as file:
            for i, text in enumerate(texts[shard::2]):
                meta = {"pile_set_name": "ab"[i % 2]}
                file.write(json.dumps({"text": text, "meta": meta}) + "\n")
    return f"{directory}/*.jsonl"


@pytest.fixture(scope="session")
def held_out(tmp_path_factory, shards) -> str:
    """Other text: that of `shards` without the first line of each document."""
    directory = tmp_path_factory.mktemp("held_out")
    for path in Path(shards).parent.iterdir():
        documents = [json.loads(line) for line in path.read_text().splitlines()]
        for document in documents:
            document["text"] = document["text"].partition("\n")[2]
        lines = [json.dumps(document) + "\n" for document in documents]
        (directory / path.name).write_text("".join(lines))
    return f"{directory}/*.jsonl"


@pytest.fixture
def config(tokenizer_file, shards, held_out):
    """configs/smoke.py on the corpus above."""
    from configs import smoke

    c = smoke.get_config()
    c.tokenizer.path = tokenizer_file
    c.data.train, c.data.evaluation = shards, held_out
    c.data.shuffle_blocks = 16
    c.steps = 12
    c.checkpoint.every = 4
    c.log.every = 3
    return c


@pytest.fixture(scope="session")
def run(tmp_path_factory, tokenizer_file, shards, held_out) -> str:
    """The workdir of a trained configs/smoke.py, to be read only."""
    from bipe_jax.training.trainer import train
    from configs import smoke

    c = smoke.get_config()
    c.tokenizer.path = tokenizer_file
    c.data.train, c.data.evaluation = shards, held_out
    workdir = str(tmp_path_factory.mktemp("run"))
    train(c, workdir)
    return workdir


@pytest.fixture(scope="session")
def command():
    """Runs `python -m bipe_jax.NAME ARGUMENTS` from the repository's root."""

    def run(name, *arguments, **kwargs):
        line = [sys.executable, "-m", f"bipe_jax.{name}", *arguments]
        return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, **kwargs)

    return run
