"""The command `bipe`: its commands, help, flags, suggestions and completion."""

import os
import re
import subprocess
import sys

import pytest
from paths import ROOT

from bipe_jax import __main__ as bipe
from bipe_jax import commands, flags, suggest
from bipe_jax.config import FIELDS, spec
from bipe_jax.data import shards
from bipe_jax.errors import UserError
from bipe_jax.evaluation import attention_distance, protocols
from bipe_jax.positions import registry
from bipe_jax.segments import check_rule
from bipe_jax.tasks import generators
from bipe_jax.tasks.evaluation import Settings

COMMAND = re.compile(r"^if __name__ == \"__main__\":", re.MULTILINE)


def run(*line, **more):
    return subprocess.run([sys.executable, *line], cwd=ROOT, capture_output=True, text=True, **more)


def test_every_module_that_is_a_command_is_one_of_bipe():
    paths = [path for path in (ROOT / "bipe_jax").rglob("*.py") if COMMAND.search(path.read_text())]
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts) for path in paths}
    known = [command.module for command in commands.COMMANDS.values()]
    assert modules - {"bipe_jax.__main__"} == set(known) and len(known) == len(set(known))
    assert all(command.summary for command in commands.COMMANDS.values())


def test_help_imports_neither_jax_nor_a_command():
    program = (
        "import sys\nfrom bipe_jax.__main__ import main\n"
        "sys.argv = ['bipe', *{}]\n"
        "try: main()\nexcept SystemExit as end: print(end.code, *sys.modules)\n"
    )
    for line in (["--help"], ["train", "--help"]):
        done = run("-c", program.format(line))
        *_, last = done.stdout.splitlines()
        assert not done.stderr and last.startswith("0 "), done.stderr
        heavy = {"jax", "numpy", "orbax", "matplotlib", "argcomplete", "bipe_jax.train"}
        assert not heavy & set(last.split())


@pytest.mark.parametrize("name", ["train", "preflight"])
def test_help_has_every_field_of_the_config_with_default_and_meaning(capsys, name):
    with pytest.raises(SystemExit) as end:
        bipe.module_of([name, "--help"])
    assert not end.value.code
    shown = capsys.readouterr().out
    words = " ".join(shown.split())
    assert "--config CONFIG" in shown and shown.startswith(f"usage: bipe {name} ")
    assert shown.index("[--config.KEY=VALUE ...]") < 300  # and not all fields
    for field in FIELDS.values():
        meaning = " ".join(f"{field.meaning} ({field.default!r})".split())
        # A long word may be broken at its hyphens.
        assert meaning.replace(" ", "") in words.replace(" ", ""), field.name
        assert f"--config.{field.name} " in shown
    # Its layout is that of the docstring.
    assert f"\n\npython -m bipe_jax.{name} --config=" in shown


@pytest.mark.parametrize("name", commands.COMMANDS)
def test_every_command_has_help(capsys, name):
    with pytest.raises(SystemExit) as end:
        bipe.module_of([name, "--help"])
    assert not end.value.code
    shown = capsys.readouterr().out
    assert commands.COMMANDS[name].description.strip() in shown


def test_a_command_runs_as_with_python_m():
    ran = [run("-m", *words) for words in (["bipe_jax", "config"], ["bipe_jax.config"])]
    assert ran[0].stdout == ran[1].stdout != "" and not ran[0].stderr + ran[1].stderr
    wrong = run("-m", "bipe_jax", "goodput", "no/such/run")
    assert wrong.returncode == 1 and not wrong.stdout
    assert wrong.stderr.startswith("error: no/such/run/events.jsonl does not exist")


def test_a_wrong_command_is_one_line_and_status_1(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bipe", "trian"])
    with pytest.raises(SystemExit) as end:
        bipe.main()
    assert end.value.code == 1
    assert capsys.readouterr().err.startswith("error: bipe has no command 'trian' (did you mean")


def refused(call, *arguments):
    with pytest.raises(UserError) as caught:
        call(*arguments)
    line = str(caught.value)
    assert "\n" not in line
    return line


def parse(name):
    return lambda words: commands.parser(name).parse_args(words)


def with_config(*words):
    return lambda: commands.parser("train").parse_with_config(["--workdir=x", *words])


def entries(*written):
    return lambda: registry.parse_entries("position.relative", written, ("position", "segment"), 2)


@pytest.mark.parametrize(
    ("call", "meant"),
    [
        (lambda: bipe.module_of(["trian"]), "train"),
        (lambda: parse("evaluate")(["--checkpoint=x", "--lenghts=3"]), "--lengths"),
        (lambda: parse("train")(["--workdri=x"]), "--workdir"),
        (lambda: parse("convert")(["from-lama", "a", "b"]), "from-llama"),
        (lambda: parse("convert")(["from-llama", "a", "b", "--tokeniser=x"]), "--tokenizer"),
        (lambda: parse("checkpoint")(["verfy", "a"]), "verify"),
        (with_config("--config=smokey"), "smoke"),
        (with_config("--config=smoke:bipe-rope"), "bipe_rope"),
        (with_config("--config=smoke", "--config.model.widht=3"), "model.width"),
        (with_config("--config=smoke", "--config.learning_rat=3"), "optimizer.learning_rate"),
        (with_config("--config=smoke", "--confg.steps=3"), "--config.steps"),
        (entries(("rop", "position")), "rope"),
        (entries(("rope", "segmnet")), "segment"),
        (entries(("alibi", "position", ("slope_scael", 2.0))), "slope_scale"),
        (lambda: check_rule("sentences"), "sentence"),
        (lambda: check_rule("regexp:x"), "regex"),
        (lambda: check_rule("pysbt"), "pysbd"),
        (lambda: shards.find(spec.parse_source("quickstrat:train").path), "quickstart"),
        (lambda: generators.task("passkeys"), "passkey"),
    ],
)
def test_what_is_mistyped_is_answered_by_what_is_meant(call, meant):
    assert f" (did you mean {meant!r}?)" in refused(call)


def test_nothing_is_suggested_for_what_resembles_nothing():
    assert suggest.did_you_mean("xyzzy", ["train", "model.width"]) == ""
    assert "did you mean" not in refused(shards.find, "a/*.jsonl")
    assert "did you mean" not in refused(shards.find, "gs:/b/*.jsonl")


def test_a_flag_has_one_spelling_or_the_other():
    for line in (
        ["--checkpoint=x", "--prompt=y", "--max_new_tokens=3", "--top-p", "0.5"],
        ["--checkpoint", "x", "--prompt", "y", "--max-new-tokens", "3", "--top_p=0.5"],
    ):
        args = commands.parser("generate").parse_args(line)
        assert (args.checkpoint, args.max_new_tokens, args.top_p) == ("x", 3, 0.5)
    assert "unrecognized arguments: --max_new=3" in refused(
        parse("generate"), ["--checkpoint=x", "--prompt=y", "--max_new=3"]
    )
    # A value is not a flag.
    assert commands.parser("generate").parse_args(["--checkpoint=--top-k", "--prompt=y"])


def test_flags_of_a_config_take_either_spelling():
    line = ["--config", "smoke", "--config.steps", "7", "--config.model.qk_norm"]
    config = flags.read_config([*line, "--config.data.workers", "-1", "--config.steps=8"])
    assert (config.steps, config.model.qk_norm, config.data.workers) == (8, True, -1)
    assert not flags.read_config(["--config=smoke", "--config.model.qk-norm=false"]).model.qk_norm


def test_defaults_of_flags_are_those_of_the_library():
    assert parse("analyse")(["--checkpoint=x"]).blocks == attention_distance.BLOCKS
    assert parse("evaluate")(["--checkpoint=x"]).protocol == protocols.SAME_TOKENS
    tasks = parse("tasks")(["--checkpoint=x"])
    assert (tasks.samples, tasks.seed) == (Settings.samples, Settings.seed)
    assert flags.numbers("depths", tasks.depths, float) == Settings.depths


@pytest.fixture(scope="module")
def completed(tmp_path_factory):
    """What bash completes a line to: by the script that `bipe completion bash` prints."""
    pytest.importorskip("argcomplete")
    directory = tmp_path_factory.mktemp("bin")
    program = directory / "bipe"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m bipe_jax "$@"\n')
    program.chmod(0o755)
    made = run("-m", "bipe_jax", "completion", "bash")
    assert made.returncode == 0, made.stderr
    script = directory / "completion.bash"
    script.write_text(
        made.stdout
        + "\nCOMP_LINE=$1 COMP_POINT=${#1} COMP_TYPE=9\n_python_argcomplete bipe\n"
        + 'printf "%s\\n" "${COMPREPLY[@]}"\n'
    )
    environment = os.environ | {"PATH": f"{directory}:{os.environ['PATH']}"}

    def complete(line):
        done = subprocess.run(
            ["bash", script, line], cwd=ROOT, env=environment, capture_output=True, text=True
        )
        return [word.strip() for word in done.stdout.split()]

    return complete


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("bipe t", ["train", "tasks"]),
        ("bipe evaluate --pro", ["--protocol"]),
        ("bipe train --config.spikes.", ["--config.spikes.threshold", "--config.spikes.policy"]),
        ("bipe train --config.optimizer.name=", ["adamw", "lion", "muon"]),
        ("bipe train --config smo", ["smoke"]),
        ("bipe train --config=configs/smo", ["configs/smoke.py"]),
    ],
)
def test_bash_completes_it(completed, line, expected):
    assert completed(line) == expected


def test_zsh_gets_a_script_too(capsys):
    pytest.importorskip("argcomplete")
    from argcomplete import shell_integration

    assert "#compdef bipe" in shell_integration.shellcode(["bipe"], shell="zsh")
    assert parse("completion")(["zsh"]).shell == "zsh"
