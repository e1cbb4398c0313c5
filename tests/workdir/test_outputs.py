"""Results: files are proved writable first, numbers shown in any case, names are text, links replaced."""

import contextlib
import html
import io
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from paths import ROOT

import tests.report.test_report as made
from bipe_jax import plot
from bipe_jax.convert import incoming, llama, to_hf
from bipe_jax.errors import Transient, UserError
from bipe_jax.evaluation.attention_distance import analyse
from bipe_jax.evaluation.evaluator import Settings, evaluate
from bipe_jax.evaluation.follow import follow
from bipe_jax.report import comparing, page, pictures, results
from bipe_jax.report.text import table
from bipe_jax.tasks import evaluation as tasks
from bipe_jax.workdir import outputs
from launch import collect

LENGTHS = {"lengths": (32, 64)}
TASKS = tasks.Settings(("passkey",), (256,), (0.5,), 1)
NAMES = (
    "$", "$x_1$", "a$b", "\\frac{$", "_hidden", "<b>&amp;\"'", "{{ 1 }} %s {}", "a\nb\tc\x1b[31m\0", "",
    "😀 é", "עברית العربية", "\u202ertl", "x" * 300, "../../etc", "\ud800", "None",
)  # fmt: skip


# What is proved.


def test_what_can_be_written_is_left_as_it_was(tmp_path):
    (tmp_path / "file").write_text("before")
    os.chmod(tmp_path / "file", 0o444)
    os.symlink("nowhere", tmp_path / "link")
    for name in ("new", "file", "link"):
        outputs.check(tmp_path / name)
    outputs.check_new(tmp_path / "a/b/c")
    outputs.check_new(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["file", "link"]
    assert (tmp_path / "file").read_text() == "before" and os.readlink(
        tmp_path / "link"
    ) == "nowhere"


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("none/x", "there is no such directory"),
        ("file/x", "there is no such directory"),
        ("directory", "Is a directory"),
        ("x" * 300, "File name too long"),
        ("/proc/x", "No such file or directory"),
    ],
)
def test_what_cannot_be_written_is_one_line(path, says, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "directory").mkdir()
    with pytest.raises(UserError, match=f"cannot be written: {says}"):
        outputs.check(tmp_path / path)


PROBE = """
import os, sys
from bipe_jax.errors import UserError
from bipe_jax.workdir import outputs
os.setuid(65534)
for name, path in zip(sys.argv[1::2], sys.argv[2::2]):
    try:
        getattr(outputs, name)(path)
        print("written")
    except UserError as error:
        print(str(error).rpartition(": ")[2])
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become another user")
def test_directories_of_others():
    def as_nobody(*names):
        line = [sys.executable, "-c", PROBE]
        for name in names:
            line += ["check_new" if "/" in name else "check", f"{directory}/{name}"]
        return subprocess.run(line, capture_output=True, text=True).stdout.splitlines()

    with tempfile.TemporaryDirectory(dir="/tmp") as directory:
        Path(directory, "theirs").touch()
        os.chmod(directory, 0o755)
        assert as_nobody("new", "a/b", "theirs") == ["Permission denied"] * 3
        os.chmod(directory, 0o1777)  # anybody may write, but not replace what is another's
        assert as_nobody("new", "a/b", "theirs") == ["written"] * 2 + ["Operation not permitted"]
        os.chmod(directory, 0o777)
        assert as_nobody("new", "theirs") == ["written"] * 2


def commands(run, output):
    """Name of a file -> what computes and writes it into a directory."""
    return {
        "evaluation.json": lambda **more: evaluate(run, output=output, **LENGTHS, **more),
        "extrapolation.png": lambda **more: evaluate(run, output=output, **LENGTHS, **more),
        "report.html": lambda **more: evaluate(run, output=output, **LENGTHS, **more),
        "attention.json": lambda **more: analyse(run, (32,), output=output, blocks=2, **more),
        "tasks.json": lambda **more: tasks.evaluate(run, TASKS, output, **more),
        "tasks.png": lambda **more: tasks.evaluate(run, TASKS, output, **more),
    }


@pytest.mark.parametrize("name", commands("", ""))
def test_nothing_is_computed_for_what_cannot_be_written(name, run, tmp_path):
    (tmp_path / name).mkdir()
    shown = []
    with pytest.raises(UserError, match=f"{name} cannot be written: Is a directory"):
        commands(run, str(tmp_path))[name](show=shown.append)
    assert not shown and os.listdir(tmp_path) == [name]


def test_commands_without_a_model_look_first_too(tmp_path, run, monkeypatch):
    saved = made.save(tmp_path / "a", evaluation=made.evaluation())
    bad = "none/x.png"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["plot", saved, f"--output={bad}"])
    monkeypatch.setattr(results, "read_file", lambda *_: pytest.fail("read"))
    with pytest.raises(
        UserError, match=r"none/x\.png cannot be written: there is no such directory"
    ):
        plot.main()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file/x/new cannot|file/x cannot be written"):
        to_hf.convert(run, str(tmp_path / "file/x"))
    with pytest.raises(UserError, match="cannot be written"):
        incoming.convert(saved, "/proc/x/y", llama)


@pytest.mark.parametrize("name", ["evaluation.json", "attention.json", "tasks.json"])
def test_numbers_are_shown_even_if_they_cannot_be_written_at_last(name, run, tmp_path):
    output = str(tmp_path / "output")
    shown = []

    def show(result):
        shown.append(result)
        shutil.rmtree(output)

    with pytest.raises(UserError, match=f"{name} cannot be written: No such file"):
        commands(run, output)[name](show=show)
    assert shown[0]["results"]


def test_a_disk_that_is_full_at_last(run, command, tmp_path):
    """Files end at 1 KiB: the table is printed, then one line, and earlier results stay."""
    (tmp_path / "evaluation.json").write_text("{}")
    line = [sys.executable, "-m", "bipe_jax.evaluate", f"--checkpoint={run}"]
    line += [f"--output={tmp_path}", "--lengths=32"]
    done = subprocess.run(
        ["bash", "-c", 'ulimit -f 1; exec "$@"', "bash", *line],
        cwd=ROOT, capture_output=True, text=True,
        env=os.environ | {"JAX_COMPILATION_CACHE_DIR": ""},
    )  # fmt: skip
    assert done.returncode == 1
    assert "perplexity" in done.stdout and "Wrote" not in done.stdout
    assert done.stderr.splitlines()[-1] == (
        f"error: {tmp_path}/evaluation.json cannot be written: File too large"
    )
    assert os.listdir(tmp_path) == ["evaluation.json"]
    assert (tmp_path / "evaluation.json").read_text() == "{}"


def test_numbers_that_json_has_not(tmp_path):
    with pytest.raises(UserError, match=r"x\.json cannot be written: .*not JSON compliant"):
        outputs.write_json(tmp_path / "x.json", {"a": float("nan")})
    assert not os.listdir(tmp_path)


def test_a_full_disk_is_not_a_users_error(tmp_path):
    with (
        pytest.raises(Transient, match="x cannot be written: No space left"),
        outputs.writing("x"),
        open("/dev/full", "w") as file,
    ):
        file.write("x" * 100_000)


# Links.


@pytest.fixture
def downloaded(run, tmp_path):
    """A copy of a run whose files are links to files of the user, and those files."""
    directory, mine = tmp_path / "downloaded", tmp_path / "mine"
    shutil.copytree(run, directory)
    mine.mkdir()
    for name in ("evaluation.json", "extrapolation.png", "report.html", "tasks.json", "tasks.png",
                 "attention.json", ".writable", "harness.json"):  # fmt: skip
        (directory / name).unlink(missing_ok=True)
        if name not in ("attention.json", "tasks.json"):
            (mine / name).write_text("mine")
        os.symlink(mine / name, directory / name)
    return directory, mine


@pytest.mark.parametrize("name", ["evaluation.json", "attention.json", "tasks.json"])
def test_nothing_is_written_through_a_link(name, downloaded):
    directory, mine = downloaded
    before = sorted(os.listdir(mine))
    commands(str(directory), str(directory))[name]()
    assert not (directory / name).is_symlink()
    if name == "evaluation.json":  # others make no page of an evaluation.json that is none
        assert not (directory / "report.html").is_symlink()
    assert sorted(os.listdir(mine)) == before
    assert {(mine / file).read_text() for file in before} == {"mine"}


def test_a_follower_writes_into_its_own_directory(downloaded):
    directory, mine = downloaded
    os.symlink(mine, directory / "evaluations")
    with pytest.raises(UserError, match="evaluations is a symbolic link: remove it"):
        follow(str(directory), Settings(**LENGTHS))
    (directory / "evaluations").unlink()
    (directory / "evaluations").mkdir()
    os.symlink(mine / "lock", directory / "evaluations" / ".lock")
    with pytest.raises(UserError, match=r"\.lock cannot be written: Too many levels of symbolic"):
        follow(str(directory), Settings(**LENGTHS))
    assert not (mine / "lock").exists()


# Names.


@pytest.mark.slow
def test_names_are_text_in_every_picture_and_page(tmp_path):
    """Sets, tasks and runs; none is lost, and none is taken for markup."""
    evaluation, asked = made.evaluation(sets=NAMES), made.tasks()
    for row, name in zip(asked["results"], NAMES, strict=False):
        row["task"] = name
    runs = []
    for number, name in enumerate(("$a_", "_b", "<i>&{}", "c\nd")):
        directory = tmp_path / name
        made.save(directory, evaluation=evaluation, tasks=asked, attention=made.attention(number))
        runs.append(str(directory))
    text = page.build(runs)
    assert made.Page(text) and "<i>" not in text and "\x1b" not in text and "\0" not in text
    for name in (
        "$x_1$",
        "\\frac{$",
        "_hidden",
        "{{ 1 }} %s {}",
        "😀 é",
        "עברית العربية",
        "x" * 300,
    ):
        assert html.escape(name) in text
    text.encode()
    loaded = [(Path(run).name, results.read_file(run, results.Evaluation)) for run in runs]
    drawn = []
    save = Figure.savefig

    def kept(figure, *arguments, **options):
        drawn.append(figure)
        save(figure, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", kept)
        pictures.perplexity(comparing.alone(loaded), str(tmp_path / "a.png"))
        pictures.accuracy("_$", results.read_file(runs[0], results.Tasks), str(tmp_path / "b.svg"))
    named = [text.get_text() for text in drawn[0].axes[0].texts]  # at the ends of the curves
    assert [name for name in ("$a_", "_b", "<i>&{}", "c↵ d") if name not in named] == []
    assert (tmp_path / "a.png").stat().st_size > 10_000


def test_names_are_one_line_of_a_table():
    lines = table(("name", "n"), [(name, str(i)) for i, name in enumerate(NAMES)]).splitlines()
    assert len(lines) == 1 + len(NAMES)
    assert [line.split()[-1] for line in lines[1:]] == [str(i) for i in range(len(NAMES))]
    assert "a\\nb\\tc\\x1b[31m\\x00" in lines[1 + NAMES.index("a\nb\tc\x1b[31m\0")]
    wide = table(("name", "n"), [("日本", "1"), ("é", "2"), ("e\u0301", "3")]).splitlines()
    assert wide[1:] == ["日本  1", "é     2", "e\u0301     3"]


@pytest.mark.slow
def test_an_evaluation_of_sets_with_any_name(run, command, tmp_path, texts):
    """From the data to the tables, the page and the picture, on a terminal of ASCII."""
    names = [name for name in NAMES if name not in ("", "\ud800")]
    with open(tmp_path / "data.jsonl", "w") as file:
        for name in names:
            file.write(json.dumps({"text": texts[0], "meta": {"pile_set_name": name}}) + "\n")
    done = command(
        "evaluate", f"--checkpoint={run}", f"--output={tmp_path}/out", "--lengths=32",
        f"--data={tmp_path}/data.jsonl",
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout + done.stderr and "could not be drawn" not in done.stderr
    rows = json.loads((tmp_path / "out/evaluation.json").read_text())["results"]
    assert {row["set"] for row in rows} == set(names)
    assert {"report.html", "extrapolation.png"} <= set(os.listdir(tmp_path / "out"))


def test_a_picture_that_cannot_be_drawn_is_a_warning(tmp_path, capsys):
    with pictures.by_product("x.png"):
        raise ValueError("bad\nmath")
    says = "x.png could not be drawn (ValueError: bad math); the numbers are saved\n"
    assert capsys.readouterr().err == says
    with pictures.by_product("x.png"):
        raise UserError("tasks.json is malformed")
    assert "x.png could not be drawn (tasks.json is malformed)" in capsys.readouterr().err
    with pytest.raises(UserError), pictures.by_product("x.png"):
        outputs.check("none/x.png")


def test_messages_have_no_control_characters():
    stream = io.StringIO()
    with contextlib.redirect_stderr(stream):
        logging.getLogger("bipe_jax.x").info("a\x1b[31m\nb\r\u202e")
    assert stream.getvalue() == "a\\x1b[31m\nb\\r\\u202e\n"


def test_a_sweep_is_shown_before_it_is_written(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(collect, "read", lambda directory: [])
    (tmp_path / "sweep.csv").mkdir()
    with pytest.raises(UserError, match=r"sweep\.csv cannot be written: Is a directory"):
        collect.collect(str(tmp_path))
