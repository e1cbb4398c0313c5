"""Data code where `os` has no sched_getaffinity, as on macOS: some of its tests once more, without it."""

import os
import sys

import pytest

from bipe_jax import hardware
from bipe_jax.data import prepare, reframe
from tests.data.test_inspect import (  # noqa: F401
    model,
    rules,
    test_a_sample_is_of_all_shards_and_says_so,
    test_long_documents_are_tokenised_in_parts_and_counted_whole,
)
from tests.data.test_stream import (  # noqa: F401
    documents,
    one_shard,
    test_a_fixed_rule_is_annotated_by_position,
    test_batches_equal_a_plain_loop,
    tokens,
)


@pytest.fixture(autouse=True)
def macos(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)


def test_cores_are_those_of_the_machine(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    assert hardware.cores() == 3
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert hardware.cores() == 1


def test_prepare_and_reframe_choose_their_workers(tmp_path, monkeypatch, shards, tokenizer_file):
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    made = prepare.prepare(shards, str(tmp_path / "prepared"), tokenizer_file, 32)
    assert made["faults"] == {}
    line = ["reframe", f"--input={shards}", f"--output={tmp_path / 'reframed'}", "--shards=1"]
    monkeypatch.setattr(sys, "argv", line)
    reframe.main()
    assert len(list((tmp_path / "reframed").glob("*.jsonl.zst"))) == 1
