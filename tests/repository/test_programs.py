"""The programs of the pages run, and print what the pages say."""

import os
import re
import subprocess
import sys

import pages
import pytest
from paths import ROOT


def programs(page):
    """The blocks of Python of a page."""
    return [text for path, _, text in pages.blocks("python") if path == page]


def run(directory, *parts):
    """What a program of several parts prints."""
    path = directory / "program.py"
    path.write_text("\n".join(parts), encoding="utf-8")
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))
    done = subprocess.run(
        [sys.executable, path],
        cwd=directory,
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_those_of_python(tmp_path):
    page = "docs/reference/python.md"
    training, decoding = (text for text in programs(page) if "import bipe_jax" in text)
    printed = run(tmp_path, training, decoding, "print([len(answer) for answer in answers])")
    *rows, lengths = printed.splitlines()
    (said,) = re.findall(r"^```\n(Plays .*?)^```", pages.pages()[page], re.MULTILINE | re.DOTALL)
    # The quickstart's text depends on Python's version.
    without_numbers = [row.rpartition(" ")[0] for row in said.splitlines()]
    assert [row.rpartition(" ")[0] for row in rows] == without_numbers
    assert re.fullmatch(r"\[[1-8], [1-8]\]", lengths)
    assert "Model: " not in printed  # which is logged


@pytest.mark.slow
def test_those_of_positions(tmp_path):
    texts = programs("docs/reference/positions.md")
    (kind,) = (text for text in texts if "class Fade" in text)
    (test,) = (text for text in texts if "def test_fade" in text)
    entered = 'from bipe_jax.positions import registry\nregistry.RELATIVE["fade"] = Fade'
    name = re.findall(r"def (test_fade\w+)\(", test)[0]
    run(tmp_path, kind, entered, test, f"{name}()")

    (attending,) = (text for text in texts if "jax.grad" in text)
    said = " ".join(re.findall(r"^print\(.*# (.*)$", attending, re.MULTILINE))
    numbers = re.compile(r"-?\d+\.?\d*")
    printed = [float(number) for number in numbers.findall(run(tmp_path, attending))]
    assert printed == pytest.approx([float(number) for number in numbers.findall(said)], rel=1e-4)
