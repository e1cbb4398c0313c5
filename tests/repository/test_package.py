"""`import bipe_jax`: quick, and its names are the library's functions, whatever is imported first."""

import subprocess
import sys

import pytest
from paths import ROOT

import bipe_jax


def run(program, *arguments):
    line = [sys.executable, "-c", program, *arguments]
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True)


def test_importing_it_imports_nothing_heavy():
    program = "import bipe_jax, sys; dir(bipe_jax), bipe_jax.__version__; print(*sys.modules)"
    done = run(program)
    assert done.returncode == 0, done.stderr
    heavy = {"jax", "numpy", "flax", "absl", "ml_collections", "orbax", "matplotlib"}
    assert not heavy & set(done.stdout.split())


def test_its_names():
    names = {"load", "apply", "train", "evaluate", "Generator", "__version__"}
    assert names == set(bipe_jax.__all__) <= set(dir(bipe_jax))
    assert all(hasattr(bipe_jax, name) for name in names)
    assert bipe_jax.__version__[0].isdecimal()
    with pytest.raises(AttributeError, match="'bipe_jax' has no attribute 'lode'"):
        bipe_jax.lode  # noqa: B018


def test_a_tree_that_is_not_installed_has_a_version(monkeypatch):
    def missing(_):
        raise bipe_jax.importlib.metadata.PackageNotFoundError

    monkeypatch.delitem(vars(bipe_jax), "__version__", raising=False)
    monkeypatch.setattr(bipe_jax.importlib.metadata, "version", missing)
    assert bipe_jax.__version__ == "0+unknown"
    monkeypatch.delitem(vars(bipe_jax), "__version__")


@pytest.mark.parametrize(
    "imports",
    [
        "import bipe_jax; bipe_jax.train, bipe_jax.evaluate; import bipe_jax.train, bipe_jax.evaluate",
        "import bipe_jax.train, bipe_jax.evaluate",
        "from bipe_jax.train import main; from bipe_jax.evaluate import main; import bipe_jax",
        "from bipe_jax import train, evaluate; import bipe_jax",
    ],
)
def test_train_and_evaluate_are_functions_and_their_modules_are_there_too(imports):
    program = (
        "import inspect, sys\n"
        f"{imports}\n"
        "assert inspect.isfunction(bipe_jax.train) and inspect.isfunction(bipe_jax.evaluate)\n"
        "import bipe_jax.train\n"
        "from bipe_jax.train import main\n"
        "assert bipe_jax.train is sys.modules['bipe_jax.train'].train\n"
        "assert callable(main) and main.__module__ == 'bipe_jax.train'\n"
        "assert inspect.ismodule(bipe_jax.errors) and inspect.ismodule(bipe_jax.cli)\n"
    )
    done = run(program)
    assert done.returncode == 0, done.stderr


def test_it_prints_nothing_and_leaves_absls_flags_to_the_program_that_imports_it(run_directory):
    program = (
        "import sys\n"
        "from absl import flags\n"
        "import bipe_jax, bipe_jax.cli, bipe_jax.train, bipe_jax.preflight\n"
        "config, params = bipe_jax.load(sys.argv[1])\n"
        "logits = bipe_jax.apply(config, params, [[1, 2, 3]])\n"
        "assert logits.shape == (1, 3, config.model.vocab_size)\n"
        "for name in ('config', 'workdir', 'stop_at', 'profile', 'topology', 'search'):\n"
        "    flags.DEFINE_string(name, 'mine', 'of the program')\n"
        "flags.FLAGS(['program', '--config=x'])\n"
        "assert flags.FLAGS.config == 'x'\n"
    )
    done = run(program, run_directory)
    assert done.returncode == 0, done.stderr
    assert done.stdout + done.stderr == "", "a library prints nothing"


@pytest.fixture
def run_directory():
    """A small checkpoint."""
    return str(ROOT / "tests" / "before_formats")
