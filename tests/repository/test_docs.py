"""What the README and docs/ say is true: programs read the commands, and files and fields exist.

A command is read by its program's parser, or run elsewhere (ELSEWHERE says where), or is in a block whose
title says what it needs, such as a cloud; commands of this project are read there too.
"""

import ast
import re
import subprocess
import tomllib

import pages
import pytest
import yaml
from command_readers import check_config, is_own, why_not
from paths import ROOT

from bipe_jax.config import FIELDS
from bipe_jax.workdir import Workdir
from configs import base

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# What is run elsewhere, as the file that runs it, or the like of it, says.
ELSEWHERE = {
    "python -m venv .venv": (".ci/run", "python3 -m venv"),
    ". .venv/bin/activate": (".ci/run", "/bin/activate"),
    "pip install -e .": ("tests/repository/test_plugins.py", '"pip", "install"'),
    "pre-commit install": (".ci/run", "pre-commit run"),
    "mkdocs build --strict": (".ci/run", "mkdocs build --strict"),
    "mkdocs serve": (".ci/run", "mkdocs build --strict"),
    "pytest -n 2 --dist loadfile --no-loadscope-reorder": (
        ".ci/run",
        "\npytest -n 2 --dist loadfile",
    ),
    "pytest tests/launch/test_slurm.py": (
        ".ci/run",
        "BIPE_SLURM=1 pytest tests/launch/test_slurm.py",
    ),
    "python tests/slurm_cluster.py": ("tests/launch/test_slurm.py", "slurm_cluster"),
    "apt-get install -y --no-install-recommends slurm-wlm slurm-client munge": (
        ".ci/run",
        "slurm-wlm slurm-client munge",
    ),
    "tensorboard --logdir runs/x": ("tests/training/test_observe.py", "tensorboard"),
    "sha256sum --check checksums.sha256": ("tests/checkpoint/test_checksums.py", '"sha256sum"'),
    "eval $(bipe completion bash)": ("tests/repository/test_desk.py", '"completion", "bash"'),
    "eval $(bipe completion zsh)": ("tests/repository/test_desk.py", 'shell="zsh"'),
}
BUILTINS = {"export", "cd", "wait"}


def test_every_command_is_read_by_its_program(monkeypatch, capfd):
    of_blocks = [command for command in pages.commands() if is_own(command.words)]
    assert len(of_blocks) > 80 and len({command.page for command in of_blocks}) > 20
    wrong = [(command, why_not(command.words, monkeypatch)) for command in of_blocks]
    # In a sentence what is clear is left out.
    missing = "arguments are required"
    wrong += [(command, why_not(command.words, monkeypatch)) for command in pages.inline()]
    shown = [f"{command}\n    {why}" for command, why in wrong if why and missing not in why]
    shown += [f"{command}\n    {why}" for command, why in wrong[: len(of_blocks)] if missing in why]
    assert not shown, "\n".join(shown)


def test_a_wrong_command_is_not_read(monkeypatch):
    for text in (
        "python -m bipe_jax.evaluate --checkpoint=x --lenghts=3",
        "python -m bipe_jax.train --config=smoke --workdir=x --config.model.widht=3",
        'bipe train --config=smoke --workdir=x --config.position.relative=\'(("rop","segment"),)\'',
        "bipe convert from-lama a b",
        "python -m bipe_jax.experiments fold --size=quick --output=x --config.model.widht=3",
        "python -m bipe_jax.experiments fold --size=quick --output=x -- --job=2",
        "python -m launch.gke --config=configs/smoke.py --workdir=/runs/a --slice=v5e:4x4 --imge=I",
        "python -m launch.gke --config=configs/smoke.py --workdir=/runs/a --slice=v5e:4x5x6 --image=I",
        "python -m launch.slurm --config=configs/smoke.py --workdir=x --dryrun",
        "python -m launch.sweep --config=configs/smoke.py --sweep=configs/sweeps/none.py --output=x",
        "python -m launch.tpu_vm watch a --zone=us-west4-a --slice=v5e:4x4 --config=configs/smoke.py",
        "python -m launch.supervise --workdir=x -- python -m bipe_jax.train --workdir=x",
        "python -m benchmarks.step --ronds=2",
        "python -m tests.faults --rnus=2",
        "python -m launch.none",
    ):
        (words,) = pages.words_of(text, {})
        assert why_not(words, monkeypatch), text


def test_every_other_command_is_run_elsewhere_or_needs_what_its_block_says():
    used = set()
    for command in pages.commands():
        program, *words = command.words
        if is_own(command.words) or command.needs or program in BUILTINS:
            continue
        if program == "pip" and (extras := re.fullmatch(r"\.\[([\w,-]+)\]", words[-1])):
            assert set(extras[1].split(",")) <= set(PROJECT["optional-dependencies"]), command
            continue
        line = " ".join(command.words)
        assert line in ELSEWHERE, (
            f"{command}: run it in a test, or say in the block's title what it needs"
        )
        path, text = ELSEWHERE[line]
        assert text in (ROOT / path).read_text(), command
        used.add(line)
    assert used == set(ELSEWHERE)


def test_a_script_is_read_as_a_shell_reads_it():
    text = """\
A="--x=1 --y='a b'" # not a command
for i in one two; do
  N=$i python -m m $A --n=$i \\
    --z='c # d; e' & # beside it
done; wait
(cd a/$i && run "$A") | tail > out
"""
    assert list(pages.words_of(text, {})) == [
        ("python", "-m", "m", "--x=1", "--y=a b", "--n=one", "--z=c # d; e"),
        ("wait",),
        ("cd", "a/one"),
        # In quotes it would be one word; no page has that.
        ("run", "--x=1", "--y=a b"),
        ("tail", ">", "out"),
    ]


def test_fields_that_are_named_exist():
    """--config.KEY anywhere, and those of Python."""
    for page, text in pages.pages().items():
        text = re.sub(
            r"^```\n.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL
        )  # what is printed
        for name in re.findall(r"--config\.([a-z][\w.]*\w)", text):
            assert name in FIELDS, f"{page}: --config.{name}"
    groups = {name.partition(".")[0] for name in FIELDS if "." in name} - {"data", "log"}
    endings = "py|md|jsonl?|sh|png|model|html|yaml|toml|safetensors|index"
    field = re.compile(
        rf"`(?:config\.)?(({'|'.join(groups)})\.(?!(?:{endings})\b)[a-z_]+)\b(?![.(/])"
    )
    for page, text in pages.pages().items():
        for name, _ in field.findall(text) if page.startswith("docs/") else ():
            assert name in FIELDS, f"{page}: {name}"


def test_configs_in_python_are_valid():
    """Each block of `config.FIELD = VALUE`; other blocks are Python."""
    seen = 0
    for _, _, text in pages.blocks("python"):
        if text.startswith(" "):  # a part of something
            continue
        tree = ast.parse(text)
        fields = [_assigned(statement) for statement in tree.body]
        if not all(fields):
            continue
        seen += 1
        made = base.get_config()
        made.update_from_flattened_dict(dict(fields))
        check_config(made)
    assert seen > 5


def _assigned(statement):
    """(field, value) of `config.FIELD = VALUE`, or nothing."""
    if isinstance(statement, ast.Assign):
        name = ast.unparse(statement.targets[0])
        if name.startswith("config."):
            assert name.removeprefix("config.") in FIELDS, name
            return name.removeprefix("config."), ast.literal_eval(statement.value)


def test_pages_that_the_code_names_exist():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout
    paths = [
        path for path in listed.splitlines() if path.endswith((".py", ".sbatch", ".yaml", ".toml"))
    ]
    if not paths:
        pytest.skip("no checkout of git")
    named = set()
    for path in paths:
        if (ROOT / path).is_file():
            text = (ROOT / path).read_text(encoding="utf-8")
            named |= set(
                re.findall(r"(?<![\w./])((?:docs|benchmarks)/[\w/-]+\.(?:md|ipynb))", text)
            )
    assert len(named) > 15
    assert not [name for name in named if not (ROOT / name).is_file()]


def test_tests_that_pages_name_exist():
    for page, text in pages.pages().items():
        for path in re.findall(r"(?<![\w./])tests/[\w/]+\.py", text):
            assert (ROOT / path).is_file(), f"{page}: {path}"


def test_links_lead_to_files():
    """Within the repository; anchors are checked by mkdocs build --strict."""
    link = re.compile(r"\]\(([^)\s#]+)(?:#[^)\s]*)?\)")
    for page, text in pages.pages().items():
        for target in link.findall(
            re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
        ):
            if not re.match("[a-z]+://|mailto:", target):
                assert (ROOT / page).parent.joinpath(target).exists(), f"{page}: {target}"


def test_every_page_is_in_the_site():
    site = (ROOT / "mkdocs.yml").read_text()
    for page in (ROOT / "docs").rglob("*"):
        if page.suffix in (".md", ".ipynb"):
            path = page.relative_to(ROOT / "docs").with_suffix(".md").as_posix()
            assert f": {path}\n" in site, path


def test_every_file_of_a_workdir_is_described():
    page = (ROOT / "docs" / "reference" / "workdir.md").read_text()
    names = [
        name for name in vars(Workdir) if isinstance(getattr(Workdir, name), str) and name[0] != "_"
    ]
    found = [getattr(Workdir, name) for name in names if name != "__doc__"]
    run = Workdir("")
    found += [
        run.restarts(),
        run.restarts("HOST"),
        run.supervisor_lock(),
        run.supervisor_lock("HOST"),
    ]
    assert len(found) > 25
    for name in found:
        assert re.search(rf"`{re.escape(name)}[`/]", page), name


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_one_version_is_told():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    changes = re.findall(
        r"^## (\S+)(?: - (\S+))?$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE
    )
    assert changes[0] == ("Unreleased", "")
    assert changes[1] == (PROJECT["version"], str(citation["date-released"]))
    assert (citation["version"], citation["license"]) == (PROJECT["version"], PROJECT["license"])
    preferred = citation["preferred-citation"]
    readme = (ROOT / "README.md").read_text()
    assert preferred["title"] in readme
    for author in preferred["authors"]:
        assert f"{author['family-names']}, {author['given-names']}" in " ".join(readme.split())
