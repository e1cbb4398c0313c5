"""Output that cannot be shown is escaped, output that cannot be written is dropped, and nothing fails."""

import json
import os
import subprocess
import sys

import pytest
from paths import ROOT

PROGRAM = """
import sys
from bipe_jax import streams
streams.harden()
streams.harden()
for _ in range(3):
    print("a ▁ é 😀 \\udcff", flush=True)
    print("error ▁", file=sys.stderr)
print("x" * 100_000)
open(sys.argv[1], "w").write(" ".join(str(open(sys.argv[1], "w").fileno())))
failure = streams.failure(sys.stdout)
sys.exit(7 if failure is None else 8)
"""


def shell(line, *arguments, **environment):
    """Runs a line of bash with PYTHON and arguments $1, ... set."""
    settings = os.environ | {"PYTHON": sys.executable, "PYTHONPATH": str(ROOT)} | environment
    return subprocess.run(
        ["bash", "-c", line, "bash", *arguments], cwd=ROOT, env=settings, capture_output=True
    )


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8", "utf-16"])
def test_characters_that_an_encoding_lacks_are_escaped(encoding, tmp_path):
    done = shell('$PYTHON -c "$1" "$2"', PROGRAM, f"{tmp_path}/x", PYTHONIOENCODING=encoding)
    assert done.returncode == 7
    text = done.stdout.decode(encoding)
    e = "\\xe9" if encoding == "ascii" else "é"
    shown = "▁ é 😀" if "utf" in encoding else f"\\u2581 {e} \\U0001f600"
    assert text.count(f"a {shown} \\udcff\n") == 3
    assert done.stderr.decode(encoding).count("error ") == 3


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ('$PYTHON -c "$1" "$2" > /dev/full', 8),
        ('$PYTHON -c "$1" "$2" 2> /dev/full', 7),
        ('$PYTHON -c "$1" "$2" > /dev/full 2> /dev/full', 8),
        ('$PYTHON -c "$1" "$2" >&-', 7),
        ('$PYTHON -c "$1" "$2" 2>&-', 7),
        ('$PYTHON -c "$1" "$2" <&- >&- 2>&-', 7),
        ('$PYTHON -c "$1" "$2" | true; exit ${PIPESTATUS[0]}', 8),
        ('$PYTHON -c "$1" "$2" 2> >(true)', 7),
    ],
)
def test_what_cannot_be_written_is_dropped(line, code, tmp_path):
    """No traceback, no "Exception ignored", and the status is the program's own."""
    done = shell(line, PROGRAM, f"{tmp_path}/x")
    assert done.returncode == code
    assert done.stderr in (b"", "error ▁\n".encode() * 3)
    # No file is opened in the place of one that was closed.
    assert int((tmp_path / "x").read_text() or 3) > 2


def test_a_stream_that_would_block_is_waited_for():
    """Nothing is lost, although another program has made the pipe non-blocking."""
    program = (
        "import os, sys\nfrom bipe_jax import streams\nstreams.harden()\n"
        "os.set_blocking(1, False)\nprint('x' * 1_000_000)\n"
    )
    done = shell('$PYTHON -c "$1" | (sleep 0.5; wc -c); exit ${PIPESTATUS[0]}', program)
    assert done.returncode == 0 and int(done.stdout) == 1_000_001


@pytest.mark.parametrize("name", ["sys.stdout", "sys.stderr"])
def test_streams_of_a_test_or_a_notebook_stay(name):
    program = (
        "import io, sys\nfrom bipe_jax import streams\n"
        f"{name} = mine = io.StringIO()\nstreams.harden()\nassert {name} is mine\n"
    )
    assert shell('$PYTHON -c "$1"', program).returncode == 0


def events(directory, **changes) -> str:
    seconds = {"step": 1.0, "starting": 1.0}
    event = {"event": "done", "time": 20.0, "since": 10.0, "step": 3, "seconds": seconds} | changes
    (directory / "events.jsonl").write_text(json.dumps(event) + "\n")
    return str(directory)


@pytest.mark.parametrize(
    ("line", "code", "says"),
    [
        ("$PYTHON -m bipe_jax.goodput $1 > /dev/full", 1, "error: standard output cannot be written: No"),
        ("$PYTHON -m bipe_jax.goodput $1 > /dev/full 2> /dev/full", 1, ""),
        ("$PYTHON -m bipe_jax.goodput $1 | true; exit ${PIPESTATUS[0]}", 0, ""),
        ("$PYTHON -m bipe_jax.goodput $1 >&- 2>&-", 0, ""),
        ("$PYTHON -m bipe_jax.goodput nowhere-▁ 2> >(cat >&2)", 1, "error: nowhere-\\u2581/events.jsonl"),
        ("$PYTHON -m bipe_jax.goodput $'no\\nwhere\\x1b' ", 1, "error: no\\nwhere\\x1b/events.jsonl does"),
        ("$PYTHON -m launch.restart --workdir=$1 --code=0 2> /dev/full", 1, ""),
        ("$PYTHON -m launch.restart --workdir=$1 --code=42 2>&-", 0, ""),
        ("$PYTHON -m bipe_jax.config > /dev/full", 0, ""),
    ],
)  # fmt: skip
def test_commands(line, code, says, tmp_path):
    done = shell(line, events(tmp_path), PYTHONIOENCODING="ascii", JAX_PLATFORMS="cpu")
    assert done.returncode == code
    assert done.stderr.decode().startswith(says) and done.stderr.count(b"\n") == bool(says)


def test_generation_ends_when_nobody_reads(run):
    """Long before its last token."""
    line = (
        "$PYTHON -m bipe_jax.generate --checkpoint=$1 --prompt=To --max_new_tokens=100000 "
        "--temperature=1 | head -c 1; exit ${PIPESTATUS[0]}"
    )
    done = shell(line, run)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"T", b"")


@pytest.mark.slow
@pytest.mark.parametrize("redirect", ["> /dev/full 2> /dev/full", ">&- 2>&-", "2> /dev/full"])
def test_a_training_goes_on_without_its_output(
    redirect, tmp_path, tokenizer_file, shards, held_out
):
    line = (
        "$PYTHON -m bipe_jax.train --config=smoke --workdir=$1 --config.tokenizer.path=$2 "
        f"--config.data.train=$3 --config.data.evaluation=$4 --config.steps=2 "
        f"--config.schedule.warmup_steps=1 {redirect}"
    )
    done = shell(
        line, f"{tmp_path}/run", tokenizer_file, shards, held_out, PYTHONIOENCODING="ascii"
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert (tmp_path / "run/evaluation.json").exists() and not (tmp_path / "run/failed").exists()
