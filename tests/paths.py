"""Paths that tests share."""

from pathlib import Path

ROOT = Path(__file__).parent.parent  # of the repository
CORPUS = ROOT.parent / "shared" / "corpus"  # real text, where it is there
