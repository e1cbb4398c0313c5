"""Preparing equals a plain loop over the documents.

The files are the same byte for byte however they are made; TFDS and a run read the same from them.
"""

import gzip
import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tensorflow_datasets as tfds
import zstandard
from array_record.python.array_record_module import ArrayRecordWriter
from grain.experimental import index_shuffle
from paths import ROOT
from tiny import tiny_plan

from bipe_jax.config.spec import parse_source
from bipe_jax.data import identity, jobs, mixing, records, tokenizer
from bipe_jax.data.mixing import integer_weights, permuted, source_counts
from bipe_jax.data.prepare import prepare, split_names
from bipe_jax.data.prepared import Prepared, open_prepared
from bipe_jax.errors import UserError

LENGTH = 24  # blocks have one token more
SETS = ("Pile-CC", "PubMed Abstracts")


@pytest.fixture(scope="module")
def tokens(tokenizer_file):
    return tokenizer.load(tokenizer_file)


def write_shard(path, documents):
    data = b"".join(
        json.dumps({"text": text, "meta": {"pile_set_name": name}}).encode() + b"\n"
        for text, name in documents
    )
    pack = {".zst": zstandard.compress, ".gz": gzip.compress}.get(path.suffix, bytes)
    path.write_bytes(pack(data))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory, texts):
    """(glob, the documents (text, set) of each of its shards)."""
    directory = tmp_path_factory.mktemp("corpus")
    sizes = [1, 300, 7, 2, 900, 40, 41, 3, 120, 60, 5, 77]
    shards = []
    for i, name in enumerate(("0.jsonl", "1.jsonl.gz", "2.jsonl.zst")):
        cut = [text[1000 : 1000 + size] for text, size in zip(texts[i:], sizes, strict=False)]
        shards.append([(text, SETS[k % 3 == 0]) for k, text in enumerate(cut)])
        write_shard(directory / name, shards[-1])
    return f"{directory}/*.jsonl*", shards


@pytest.fixture(scope="module")
def directory(tmp_path_factory, corpus, tokenizer_file, command):
    """Prepared by the command, with two processes, where `tfds.data_source` looks for it."""
    path = tmp_path_factory.mktemp("tfds") / "pile" / "1.0.0"
    made = command(
        "data.prepare",
        f"--input={corpus[0]}",
        f"--output={path}",
        f"--tokenizer={tokenizer_file}",
        f"--length={LENGTH}",
        "--workers=2",
    )
    assert made.returncode == 0, made.stderr
    assert "documents" in made.stderr
    return path


def plain_blocks(tokens, documents, length):
    """[(tokens, document ids)] of the documents' texts, one after the other, the last one padded."""
    ids = [(int(t), n) for n, text in enumerate(documents) for t in tokens.encode(text)]
    blocks = []
    for start in range(0, len(ids), length):
        block = ids[start : start + length]
        numbers = [n - block[0][1] + 1 for _, n in block] + [0] * (length - len(block))
        blocks.append(([t for t, _ in block] + [0] * (length - len(block)), numbers))
    return blocks


def contents(path) -> dict:
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def config_for(directory, batch_size=8, **overrides):
    own = {"data__train": f"prepared:{directory}", "sequence_length": LENGTH}
    return tiny_plan(**own | {"batch_size": batch_size} | overrides)


def one_line(error) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


class TestPrepare:
    def test_equals_a_plain_loop_and_tfds_reads_it(self, directory, corpus, tokens):
        builder = tfds.builder_from_directory(directory)
        made = json.loads((directory / "bipe.json").read_text())
        assert sorted(made["sets"]) == sorted(SETS)
        for name, split in (("Pile-CC", "Pile_CC"), ("PubMed Abstracts", "PubMed_Abstracts")):
            wanted = []
            for documents in corpus[1]:
                held = [text for text, of in documents if of == name]
                wanted += plain_blocks(tokens, held, LENGTH + 1)
            for source in (
                builder.as_data_source(split=split),
                tfds.data_source("pile", data_dir=directory.parent.parent, split=split),
            ):
                assert [
                    (b["tokens"].tolist(), b["document_ids"].tolist()) for b in source
                ] == wanted
            mine = open_prepared(parse_source(f"prepared:{directory}#{name}"))
            read = mine.read(range(len(wanted)))
            assert read["tokens"].dtype == np.int32
            np.testing.assert_array_equal(read["tokens"], [b[0] for b in wanted])
            np.testing.assert_array_equal(read["document_ids"], [b[1] for b in wanted])
            held = [text for documents in corpus[1] for text, of in documents if of == name]
            counts = made["sets"][name]
            assert counts["documents"] == len(held)
            source = parse_source(f"prepared:{directory}#{name}")
            assert identity.count_documents(source) == len(held)
            assert counts["tokens"] == sum(len(tokens.encode(text)) for text in held)
            assert counts["text_bytes"] == sum(len(text.encode()) for text in held)
            assert counts["blocks"] == len(wanted)
        for file in directory.glob("*.array_record*"):
            assert "group_size:1" in records.ArrayRecordReader(str(file)).writer_options_string()

    def test_one_process_writes_the_same_bytes(self, directory, corpus, tokenizer_file, tmp_path):
        prepare(corpus[0], str(tmp_path / "a"), tokenizer_file, LENGTH, workers=1)
        assert contents(tmp_path / "a") == contents(directory)

    def test_a_second_run_changes_nothing(self, directory, corpus, tokenizer_file):
        before = contents(directory)
        done = prepare(corpus[0], str(directory), tokenizer_file, LENGTH)
        assert done == json.loads(before["bipe.json"]) and contents(directory) == before

    def test_many_shards_share_jobs(self, directory, corpus, tokenizer_file, tmp_path, monkeypatch):
        monkeypatch.setattr(jobs, "MOST_JOBS", 2)
        made = prepare(corpus[0], str(tmp_path / "a"), tokenizer_file, LENGTH, workers=1)
        before = json.loads((directory / "bipe.json").read_text())
        for name in SETS:
            assert len(made["sets"][name]["files"]) == 2 < len(before["sets"][name]["files"])
            for key in ("documents", "tokens", "text_bytes"):
                assert made["sets"][name][key] == before["sets"][name][key]
        assert [list(jobs.shards_of(i, 5)) for i in range(jobs.count(5))] == [[0, 1, 2], [3, 4]]

    def test_document_packing(self, corpus, tokens, tokenizer_file, tmp_path):
        path = str(tmp_path / "a")
        made = prepare(
            corpus[0], path, tokenizer_file, LENGTH, packing="document", sets=SETS[:1], workers=1
        )
        assert list(made["sets"]) == [SETS[0]]
        dataset = open_prepared(parse_source(f"prepared:{path}"))
        blocks = dataset.read(range(dataset.blocks))
        found = []
        for row, ids in zip(blocks["tokens"], blocks["document_ids"], strict=True):
            found += [tuple(row[ids == i].tolist()) for i in range(1, ids.max() + 1)]
        wanted = []
        for text in (text for documents in corpus[1] for text, of in documents if of == SETS[0]):
            ids = tokens.encode(text).tolist()
            cut = range(0, len(ids), LENGTH + 1)
            wanted += [tuple(ids[i : i + LENGTH + 1]) for i in cut]
        assert sorted(found) == sorted(wanted)

    @pytest.mark.parametrize("kind", ["concat", "document"])
    def test_packs_in_windows(self, kind, tmp_path, monkeypatch):
        monkeypatch.setattr(records, "_WINDOW", 40)
        writer = records.SetWriter(str(tmp_path / "a"), 10, 100, kind)
        sizes, first = [7, 25, 3, 60, 8, 1], 0
        for size in sizes:
            parts = np.array_split(np.arange(first, first + size, dtype=np.int32) % 100, 2)
            writer.add({"tokens": parts[0]}, True, 0, 0)
            writer.add({"tokens": parts[1]}, False, 0, 0)
            first += size
        counts = writer.close()
        file = records.ArrayRecordReader(str(tmp_path / "a"))
        read = np.stack([np.frombuffer(r, np.uint8) for r in file.read_all()])
        fields = records.layout(10, 100)[1]
        rows, ids = (records.read_field(read, fields[n], 10) for n in ("tokens", "document_ids"))
        assert counts["blocks"] == len(rows) and counts["documents"] == len(sizes)
        assert counts["tokens"] == (ids > 0).sum() == sum(sizes)
        if kind == "concat":
            np.testing.assert_array_equal(rows[ids > 0], np.arange(first) % 100)
            assert (ids[:-1] > 0).all()

    @pytest.mark.parametrize("length, vocab_size", [(3, 100), (70_000, 65_536), (20, 65_537)])
    def test_records_are_what_tfds_reads(self, length, vocab_size):
        record, fields = records.layout(length, vocab_size)
        assert fields["tokens"]["dtype"] == ("uint16" if vocab_size <= 65_536 else "int32")
        values = np.arange(length)[None] % vocab_size
        row = np.frombuffer(record, np.uint8)[None].copy()
        features = {}
        for name, field in fields.items():
            dtype = np.dtype(field["dtype"])
            start = field["offset"]
            row[:, start : start + length * dtype.itemsize] = values.astype(dtype).view(np.uint8)
            features[name] = tfds.features.Tensor(
                shape=(length,), dtype=dtype.type, encoding="bytes"
            )
            np.testing.assert_array_equal(records.read_field(row, field, length), values)
        read = tfds.features.FeaturesDict(features).deserialize_example_np(row.tobytes())
        for name in fields:
            np.testing.assert_array_equal(read[name], values[0])

    def test_split_names(self):
        names = split_names(["a b", "A-b", "all", "Wikipedia (en)", "é", "a_b_2"])
        assert len({name.lower() for name in names.values()}) == len(names)
        assert names["Wikipedia (en)"] == "Wikipedia_en" and names["all"] == "all_2"


@pytest.fixture(scope="module")
def larger(tmp_path_factory, texts):
    """A glob of shards that take some time."""
    directory = tmp_path_factory.mktemp("larger")
    for i in range(6):
        write_shard(directory / f"{i}.jsonl", [(text, SETS[0]) for text in texts[i:]] * 5)
    return f"{directory}/*.jsonl"


def start(larger, output, tokenizer_file):
    """The command, when it has done its first job; and its processes."""
    line = [sys.executable, "-m", "bipe_jax.data.prepare", f"--input={larger}", f"--output={output}",
            f"--tokenizer={tokenizer_file}", f"--length={LENGTH}", "--workers=2"]  # fmt: skip
    process = subprocess.Popen(line, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    while not list(output.glob("parts/*.json")):
        assert process.poll() is None
        time.sleep(0.005)
    task = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    children = [int(child) for child in task.read_text().split()]
    workers = [c for c in children if b"spawn_main" in Path(f"/proc/{c}/cmdline").read_bytes()]
    assert len(workers) == 2
    return process, workers


class TestStops:
    @pytest.mark.slow
    def test_killed_and_run_again(self, larger, tokenizer_file, tmp_path):
        process, workers = start(larger, tmp_path / "a", tokenizer_file)
        process.send_signal(signal.SIGKILL)
        process.wait()
        until = time.monotonic() + 10
        while any(Path(f"/proc/{worker}").exists() for worker in workers):
            assert time.monotonic() < until, "a worker outlives its parent"
            time.sleep(0.01)
        assert len(list((tmp_path / "a" / "parts").glob("*.json"))) < 6
        with pytest.raises(UserError, match="not completely prepared: run the same"):
            open_prepared(parse_source(f"prepared:{tmp_path / 'a'}"))
        for name in ("a", "b"):
            prepare(larger, str(tmp_path / name), tokenizer_file, LENGTH, workers=1)
        assert contents(tmp_path / "a") == contents(tmp_path / "b")

    def test_a_worker_that_dies(self, larger, tokenizer_file, tmp_path):
        process, workers = start(larger, tmp_path / "a", tokenizer_file)
        os.kill(workers[0], signal.SIGKILL)
        _, text = process.communicate(timeout=60)
        assert process.returncode == 1
        last = text.splitlines()[-1]
        assert last.startswith("error: ") and "exit code -9" in last and "--workers" in last

    def test_full_disk(self, corpus, tokenizer_file, tmp_path, command):
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))  # the command inherits it
        try:
            made = command(
                "data.prepare",
                f"--input={corpus[0]}",
                f"--output={tmp_path}/a",
                f"--tokenizer={tokenizer_file}",
                f"--length={LENGTH}",
                "--workers=1",
            )
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert made.returncode == 1 and "Traceback" not in made.stderr
        assert made.stderr.splitlines()[-1].startswith(f"error: --output={tmp_path}/a cannot be")

    def test_stopped_while_files_get_their_names(
        self, directory, corpus, tokenizer_file, tmp_path, monkeypatch
    ):
        def fail(*_):
            raise KeyboardInterrupt

        with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
            m.setattr("bipe_jax.data.prepare.describe_for_tfds", fail)
            prepare(corpus[0], str(tmp_path / "a"), tokenizer_file, LENGTH, workers=1)
        prepare(corpus[0], str(tmp_path / "a"), tokenizer_file, LENGTH, workers=1)
        assert contents(tmp_path / "a") == contents(directory)

    def test_corrupt_shards(self, corpus, tokenizer_file, tmp_path):
        for path in Path(corpus[0]).parent.iterdir():
            shutil.copy(path, tmp_path)
        bad = tmp_path / "2.jsonl.zst"
        bad.write_bytes(bad.read_bytes()[:-20])
        arguments = (f"{tmp_path}/*.jsonl*", str(tmp_path / "out"), tokenizer_file, LENGTH)
        with pytest.raises(UserError, match="corrupt or truncated"):
            prepare(*arguments, workers=1)
        with pytest.raises(UserError, match="more than"):
            prepare(*arguments, workers=1, on_error="skip", max_bad_share=0.1)
        made = prepare(*arguments, workers=1, on_error="skip", max_bad_share=0.5)
        assert made["faults"] == {"truncated_shards": 1}


def write_tfds(path, records, **features):
    """A TFDS dataset of records in an ArrayRecord file, with a feature `text` and others."""
    features = tfds.features.FeaturesDict({"text": tfds.features.Text(), **features})
    template = tfds.core.ShardedFileTemplate(
        data_dir=path, dataset_name="plays", filetype_suffix="array_record", template=
        "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
    )  # fmt: skip
    path.mkdir(parents=True)
    writer = ArrayRecordWriter(
        str(path / "plays-train.array_record-00000-of-00001"), "group_size:1"
    )
    for record in records:
        writer.write(features.serialize_example(record))
    writer.close()
    split = tfds.core.SplitInfo(
        name="train", shard_lengths=[len(records)], num_bytes=0, filename_template=template
    )
    tfds.folder_dataset.write_metadata(
        data_dir=path, features=features, split_infos=[split], filename_template=template,
        check_data=False,
    )  # fmt: skip


def test_a_tfds_source_needs_no_tensorflow(texts, tokens, tokenizer_file, tmp_path):
    held = [text[:200] for text in texts[:5]]
    write_tfds(tmp_path / "plays" / "1.0.0", [{"text": text} for text in held])
    script = f"""
import sys
from bipe_jax.config.spec import parse_source
from bipe_jax.data.prepare import prepare
from bipe_jax.data.prepared import open_prepared
prepare("tfds:{tmp_path}/plays/1.0.0:train", "{tmp_path}/out", "{tokenizer_file}", {LENGTH}, workers=1)
open_prepared(parse_source("prepared:{tmp_path}/out")).read([0])
assert "tensorflow_datasets" in sys.modules and "tensorflow" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)
    dataset = open_prepared(parse_source(f"prepared:{tmp_path}/out#plays"))
    read = dataset.read(range(dataset.blocks))
    # Stretches of the dataset are its shards, each document one of its own here.
    wanted = [block for text in held for block in plain_blocks(tokens, [text], LENGTH + 1)]
    np.testing.assert_array_equal(read["tokens"], [block[0] for block in wanted])


class TestBeam:
    def command(self, command, corpus, tokenizer_file, output, *arguments):
        return command(
            "data.prepare",
            f"--input={corpus[0]}",
            f"--output={output}",
            f"--tokenizer={tokenizer_file}",
            f"--length={LENGTH}",
            "--runner=DirectRunner",
            *arguments,
        )

    @pytest.mark.parametrize("mode", ["in_memory", "multi_processing"])
    def test_writes_the_same_bytes(
        self, mode, directory, corpus, tokenizer_file, tmp_path, command
    ):
        pytest.importorskip("apache_beam")
        options = (f"--direct_running_mode={mode}", "--direct_num_workers=2")
        made = self.command(command, corpus, tokenizer_file, tmp_path / "a", *options)
        assert made.returncode == 0, made.stderr
        assert contents(tmp_path / "a") == contents(directory)

    def test_refusals(self, corpus, tokenizer_file, tmp_path, command):
        pytest.importorskip("apache_beam")
        made = self.command(
            command, corpus, tokenizer_file, tmp_path / "a", "--direct_running_mode=multi_threading"
        )
        assert made.returncode == 1
        assert "may corrupt data: use multi_processing" in made.stderr.splitlines()[-1]
        bad = tmp_path / "bad.jsonl"
        bad.write_text("{\n")
        made = self.command(command, (str(bad),), tokenizer_file, tmp_path / "b")
        assert made.returncode == 1 and "Traceback" not in made.stderr
        assert made.stderr.splitlines()[-1].startswith("error: data: 1 of 1 lines")

    def test_without_beam(self, corpus, tokenizer_file, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "apache_beam", None)
        monkeypatch.setitem(sys.modules, "apache_beam.options.pipeline_options", None)
        with pytest.raises(UserError, match=r"pip install -e '\.\[beam\]'"):
            prepare(corpus[0], str(tmp_path / "a"), tokenizer_file, LENGTH, runner="DirectRunner")


def rows(block) -> list:
    return [tuple(row) for row in np.concatenate(list(block.values()), axis=1).tolist()]


class TestPrepared:
    def batches(self, directory, tokens, processes, count, first=0, mixture="", **overrides):
        """Whole batches, put together from the rows of so many processes."""
        overrides |= {"data__train": mixture or f"prepared:{directory}"}
        config = config_for(directory, **overrides)
        readers = [
            Prepared(config, config.training, tokens, (i, processes)) for i in range(processes)
        ]
        for reader in readers:
            reader.set_state(json.loads(json.dumps({"batch": first})))
        size = config.batch_size // processes
        return [[row for r in readers for row in rows(r.take(size))] for _ in range(count)]

    def rows(self, *arguments, **keywords):
        return [row for batch in self.batches(*arguments, **keywords) for row in batch]

    @pytest.mark.parametrize("processes", [1, 2, 4])
    def test_each_block_once_an_epoch(self, directory, tokens, processes):
        dataset = open_prepared(parse_source(f"prepared:{directory}"))
        count = 2 * dataset.blocks // 8 + 1
        given = self.rows(directory, tokens, processes, count)
        every = sorted(rows(dataset.read(range(dataset.blocks))))
        one, two = given[: dataset.blocks], given[dataset.blocks : 2 * dataset.blocks]
        assert sorted(one) == sorted(two) == every
        assert one != two and one != every

    def test_goes_on_with_other_processes(self, directory, tokens):
        whole = self.batches(directory, tokens, 1, 12)
        assert self.batches(directory, tokens, 2, 5) == whole[:5]
        assert self.batches(directory, tokens, 4, 7, first=5) == whole[5:]
        assert self.batches(directory, tokens, 1, 12, seed=1) != whole

    def test_state_is_one_integer(self, directory, tokens):
        config = config_for(directory)
        prepared = Prepared(config, config.training, tokens, (0, 1))
        prepared.take(8)
        assert prepared.get_state() == {"batch": 1}
        blocks = open_prepared(parse_source(config.data.train)).blocks
        assert prepared.consumed() == {config.data.train: (8, 8 / blocks)}
        prepared.close()

    def test_mixture(self, directory, tokens):
        specs = [f"prepared:{directory}#{name}" for name in SETS[:2]]
        mixture = f"{specs[0]}@0.7; {specs[1]}@0.3"
        own = []
        for spec in specs:
            dataset = open_prepared(parse_source(spec))
            own.append(set(rows(dataset.read(range(dataset.blocks)))))
        assert not own[0] & own[1]
        given = self.rows(directory, tokens, 2, 25, mixture=mixture)
        for n in (1, 10, 100, 200):
            counts = [sum(row in held for row in given[:n]) for held in own]
            assert sum(counts) == n and abs(counts[0] - 0.7 * n) < 1
        config = config_for(directory, data__train=mixture)
        prepared = Prepared(config, config.training, tokens)
        prepared.set_state({"batch": 25})
        assert [n for n, _ in prepared.consumed().values()] == counts
        # A source is read through before anything of it comes again.
        size = len(own[1])
        seen = [row for row in given if row in own[1]]
        assert len(seen) >= size and len(set(seen[:size])) == size

    def test_what_is_held_out_never_comes(self, directory, tokens):
        held_out = open_prepared(parse_source(f"prepared:{directory}#{SETS[1]}"))
        held = set(rows(held_out.read(range(held_out.blocks))))
        by_config = self.rows(directory, tokens, 1, 20, data__sets=(SETS[0],))
        by_spec = self.rows(directory, tokens, 1, 20, mixture=f"prepared:{directory}#{SETS[0]}")
        assert by_config == by_spec and not held & set(by_config)


class TestMixing:
    @pytest.mark.parametrize("shares", [[1.0], [0.5, 0.5], [0.1, 0.2, 0.7], [1e-6, 1, 3, 0.3]])
    def test_source_counts(self, shares):
        weights = integer_weights(shares)
        counts = source_counts(np.arange(5000), weights)
        steps = np.diff(counts, axis=0)
        assert (counts[0] == 0).all() and (steps >= 0).all() and (steps.sum(axis=1) == 1).all()
        expected = np.arange(5000)[:, None] * np.asarray(shares) / sum(shares)
        assert np.abs(counts - expected).max() < len(shares)
        assert source_counts(10**11, weights).sum() == 10**11

    def test_a_weight_too_small(self):
        with pytest.raises(UserError, match="less than a 16-millionth"):
            integer_weights([1.0, 1e-9])

    @pytest.mark.parametrize("blocks", [1, 2, 7, 1000, 65_537, 65_538, 131_073, 150_000])
    def test_permuted(self, blocks):
        orders = [[permuted(e * blocks + i, blocks, 3, 0) for i in range(blocks)] for e in (0, 1)]
        for order in orders:
            assert sorted(order) == list(range(blocks))
        if blocks > 2:
            assert orders[0] != orders[1]
            assert orders[0] != [permuted(i, blocks, 3, 1) for i in range(blocks)]

    @pytest.mark.parametrize(
        "size", [65_537, 65_538, 100_000, 2**17 + 1, 2**18, 2**18 + 1, 2**20 + 2, 3**20, 2**37]
    )
    def test_permuted_as_grain_does(self, size):
        # Grain returns no permutation of 4^n + 1 indices: one of 4^n + 2 is walked instead.
        largest = size if size in (2**16 + 1, 2**18 + 1) else size - 1
        for seed in (0, 7, 2**32 - 1):
            for index in np.linspace(0, size - 1, 50, dtype=np.int64).tolist():
                expected = index_shuffle(index, max_index=largest, seed=seed, rounds=4)
                while expected >= size:
                    expected = index_shuffle(expected, max_index=largest, seed=seed, rounds=4)
                assert mixing._index_shuffle(index, size, seed) == expected

    def test_the_order_never_changes(self):
        assert [permuted(i, 1000, 3, 0) for i in range(5)] == [380, 632, 98, 432, 372]
        assert [permuted(i, 10**6, 3, 0) for i in range(5)] == [
            580573,
            639568,
            751863,
            684403,
            965528,
        ]


class TestRefusals:
    @pytest.mark.parametrize(
        "change, words",
        [
            ({"length": 30}, r"--length is 30, but .* was begun with 24"),
            ({"packing": "document"}, r"--packing is 'document', but .* 'concat'"),
            ({"sets": ("x",)}, r"--sets is \['x'\], but"),
            ({"input": "quickstart:train"}, r"--input is 'quickstart:train', but"),
        ],
    )
    def test_other_settings(self, change, words, directory, corpus, tokenizer_file):
        arguments = {"input": corpus[0], "length": LENGTH} | change
        with pytest.raises(UserError, match=words) as error:
            prepare(output=str(directory), tokenizer_path=tokenizer_file, **arguments)
        assert "--output" in one_line(error)

    def test_another_tokenizer(self, directory, corpus, texts, tokens, tmp_path):
        other = tmp_path / "other.model"
        other.write_bytes(tokenizer.train(texts[:9], tokens.vocab_size, 100_000).model)
        with pytest.raises(UserError, match="--tokenizer is not what"):
            prepare(corpus[0], str(directory), str(other), LENGTH)
        config = config_for(directory)
        with pytest.raises(UserError, match="prepared with another tokenizer"):
            Prepared(config, config.training, tokenizer.load(str(other)))

    def test_new_shards(self, corpus, tokenizer_file, tmp_path):
        shard = Path(corpus[0]).parent / "0.jsonl"
        shutil.copy(shard, tmp_path / "0.jsonl")
        arguments = (f"{tmp_path}/*.jsonl", str(tmp_path / "out"), tokenizer_file, LENGTH)
        prepare(*arguments, workers=1)
        done = prepare(*arguments, workers=1)
        shutil.copy(shard, tmp_path / "1.jsonl")
        with pytest.raises(UserError, match=r"--input \(its shards\) is not what"):
            prepare(*arguments, workers=1)
        (tmp_path / "1.jsonl").unlink()
        moved = tmp_path / "elsewhere"
        moved.mkdir()
        (tmp_path / "0.jsonl").rename(moved / "0.jsonl")
        assert prepare(f"{moved}/0.jsonl", *arguments[1:], workers=1) == done
        data = (moved / "0.jsonl").read_bytes()
        (moved / "0.jsonl").write_bytes(data.replace(b"a", b"e", 1))
        with pytest.raises(UserError, match=r"--input is .*was begun with"):
            prepare(f"{moved}/0.jsonl", *arguments[1:], workers=1)

    def test_directories_of_something_else(self, corpus, tokenizer_file, tmp_path):
        (tmp_path / "notes.txt").write_text("x")
        with pytest.raises(UserError, match="holds files that are no preparation"):
            prepare(corpus[0], str(tmp_path), tokenizer_file, LENGTH)
        for path in (tmp_path, tmp_path / "nowhere", tmp_path / "notes.txt"):
            with pytest.raises(UserError, match="no prepared directory"):
                open_prepared(parse_source(f"prepared:{path}"))

    def test_nothing_to_prepare(self, corpus, tokenizer_file, tmp_path):
        with pytest.raises(UserError, match="holds no document of the sets x"):
            prepare(corpus[0], str(tmp_path / "a"), tokenizer_file, LENGTH, sets=("x",), workers=1)

    @pytest.mark.parametrize(
        "overrides, words",
        [
            ({"sequence_length": 16}, "config.sequence_length=16, but .* with 24"),
            ({"data__packing": "document"}, "config.data.packing='document', but .* 'concat'"),
            ({"data__cut_documents": "continue"}, "config.data.cut_documents='continue' needs"),
            ({"data__sets": ("Books",)}, "no set 'Books': it has 'Pile-CC', 'PubMed Abstracts'"),
        ],
    )
    def test_a_config_that_does_not_fit(self, overrides, words, directory, tokens):
        if "data__cut_documents" in overrides:
            overrides = overrides | {"data__separate_documents": True}
        config = config_for(directory, **overrides)
        with pytest.raises(UserError, match=words) as error:
            Prepared(config, config.training, tokens)
        one_line(error)

    def test_an_unknown_set(self, directory):
        with pytest.raises(UserError, match="no set 'Books': it has"):
            open_prepared(parse_source(f"prepared:{directory}#{SETS[0]}|Books"))

    @pytest.mark.parametrize("damage", ["flip", "cut", "gone", "description", "format"])
    def test_damage(self, damage, directory, tmp_path):
        path = tmp_path / "copy"
        shutil.copytree(directory, path)
        file = path / "blocks-Pile_CC.array_record-00001-of-00003"
        data = bytearray(file.read_bytes())
        if damage == "flip":
            at = data.index(b"(\xb5/\xfd") + 20  # within a compressed record
            data[at] ^= 0xFF
            file.write_bytes(data)
        elif damage == "cut":
            file.write_bytes(data[: len(data) // 3])
        elif damage == "gone":
            file.unlink()
        elif damage == "description":
            (path / "bipe.json").write_text('{"format": 1')
        else:
            (path / "bipe.json").write_text('{"format": 0}')
        with pytest.raises(UserError) as error:
            dataset = open_prepared(parse_source(f"prepared:{path}"))
            dataset.read(range(dataset.blocks))
        named = (
            "bipe.json"
            if damage == "description"
            else path.name
            if damage == "format"
            else file.name
        )
        assert named in one_line(error) and "prepare" in one_line(error)

    @pytest.mark.parametrize(
        "arguments, words",
        [
            (("--length=1",), "--length=1 must be at least 2"),
            (("--workers=-1",), "--workers=-1 must be at least 0"),
            (("--max_bad_share=2",), "--max_bad_share=2 must be from 0 to 1"),
            (("--project=x",), "unrecognized arguments: --project=x"),
        ],
    )
    def test_arguments(self, arguments, words, tmp_path, monkeypatch):
        from bipe_jax.data.prepare import main

        line = ["x", "--input=a", f"--output={tmp_path}", "--tokenizer=b", "--length=8", *arguments]
        monkeypatch.setattr(sys, "argv", line)
        with pytest.raises(UserError, match=words):
            main()


@pytest.mark.parametrize("workers", [1, 2])
def test_what_a_user_should_know_of_the_tokenizer_is_said_once(tmp_path, texts, capfd, workers):
    """Its only source of text is the set `b`, of which a quarter of the bytes is not in the tokenizer."""
    lines = [line for line in "".join(texts).splitlines() if line.isascii()]
    path, model = tmp_path / "of_ascii.model", io.BytesIO()
    options = {"vocab_size": 300, "normalization_rule_name": "identity", "minloglevel": 2}
    options |= {"remove_extra_whitespaces": False, "character_coverage": 1.0, "bos_id": -1}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, **options
    )
    path.write_bytes(model.getvalue())
    for shard in ("0", "1"):
        documents = [("plain text", "a"), ("\u96c6" * 10 + "x" * 90, "b")] * 20
        write_shard(tmp_path / f"{shard}.jsonl", documents)

    def said(output, sets):
        prepare(f"{tmp_path}/?.jsonl", str(output), str(path), LENGTH, sets=sets, workers=workers)
        return [line for line in capfd.readouterr().err.splitlines() if "tokenizer" in line]

    bos = "The tokenizer has no BOS: each document begins with EOS"
    share = "The tokenizer replaces 25.00% of the text (by <unk>, or by a normaliser), by 4,800 bytes of it"
    assert said(tmp_path / "b", ("b",)) == [bos, share]
    assert said(tmp_path / "b", ("b",)) == [], "it is complete already"
    assert said(tmp_path / "a", ("a",)) == [bos]


def test_sets_of_any_name(tmp_path, tokenizer_file):
    names = [
        "n" * 300,
        "n" * 299 + "m",
        "a/b\\c",
        "..",
        "\u96c6",
        "\U0001f600",
        "",
        "all",
        "$x^{2}$",
    ]
    with open(tmp_path / "a.jsonl", "w") as file:
        for name in names:
            file.write(json.dumps({"text": "t " * 99, "meta": {"pile_set_name": name}}) + "\n")
    out = tmp_path / "out"
    done = prepare(f"{tmp_path}/a.jsonl", str(out), tokenizer_file, LENGTH, workers=1)
    assert set(done["sets"]) == set(names)
    for name in names:
        source = parse_source(f"prepared:{out}#{name}") if "|" not in name and name else None
        if source:
            dataset = open_prepared(source)
            assert dataset.read([0])["tokens"].shape == (1, LENGTH + 1)
