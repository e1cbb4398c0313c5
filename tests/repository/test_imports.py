"""Conventions of the source: who imports whom (the rooms are in pyproject.toml), where, and how much."""

import ast
import subprocess
import sys
import sysconfig
import warnings
from pathlib import Path

import pytest
from paths import ROOT

SOURCES = sorted(path for name in ("bipe_jax", "launch") for path in (ROOT / name).rglob("*.py"))

# What a function may import, since it is an optional extra or slow to import and seldom needed.
OPTIONAL = {
    "apache_beam", "argcomplete", "chess", "lm_eval", "matplotlib", "pysbd", "rouge_score",
    "tensorflow_datasets", "torch", "transformers", "wandb",
}  # fmt: skip
# Modules whose functions may import the project's modules: {module: what}.
LAZY = {
    "bipe_jax.harness": {"bipe_jax.evaluation.harness_model.Harness"},
    "launch.sweep": {"launch.collect.collect"},
}  # fmt: skip

LONGEST = 400


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of_functions(tree: ast.AST) -> set[str]:
    """Full names of what functions import: "a.b" of `import a.b` and of `from a import b`."""
    found = set()
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
            for node in ast.walk(function):
                if isinstance(node, ast.Import):
                    found |= {alias.name for alias in node.names}
                elif isinstance(node, ast.ImportFrom):
                    assert node.level == 0, "relative imports are for config files"
                    found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_rooms_import_what_is_below_them_and_there_are_no_circles():
    # The program of import-linter, whose report says where.
    program = Path(sysconfig.get_path("scripts")) / "lint-imports"
    line = [sys.executable, program, "--no-cache", "--no-logo"]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.fail(done.stdout + done.stderr, pytrace=False)


def test_functions_import_nothing_that_modules_could():
    found = {}
    for path in SOURCES:
        names = imports_of_functions(ast.parse(path.read_text()))
        if names := {name for name in names if name.partition(".")[0] not in OPTIONAL}:
            found[module_of(path)] = names
    assert found == LAZY


def test_the_imports_of_functions_are_seen():
    text = "import a\ndef f():\n  import b.c\n  class D:\n    async def g(self):\n      from e import h\n"
    assert imports_of_functions(ast.parse(text)) == {"b.c", "e.h"}


def test_modules_are_short():
    lines = {module_of(path): len(path.read_text().splitlines()) for path in SOURCES}
    assert {module for module, count in lines.items() if count > LONGEST} == set()


@pytest.mark.parametrize(
    "module", ["bipe_jax.data.stream", "launch.jobs", "tests.data.test_x", "tests.faults"]
)
def test_deprecated_calls_of_this_project_are_errors(module):
    def warn(module):
        warnings.warn_explicit("x is deprecated", DeprecationWarning, "x.py", 1, module)

    with pytest.raises(DeprecationWarning):
        warn(module)
    with pytest.warns(DeprecationWarning):
        warn("somebody.elses")
