"""The wheel: it has every file of the package and the configs, and trains in an empty environment."""

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
from paths import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy: a build leaves files beside what it reads."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "setup.py", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("bipe_jax", "configs"):
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, source / name, ignore=ignore)
    output = tmp_path_factory.mktemp("wheel")
    line = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    done = subprocess.run([*line, f"--wheel-dir={output}", source], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = output.glob("*.whl")
    return path


def test_the_wheel_has_every_file_of_the_package_and_the_configs(wheel):
    def files(name):
        found = (path for path in (ROOT / name).rglob("*") if path.is_file())
        return {str(path.relative_to(ROOT)) for path in found if "__pycache__" not in path.parts}

    # For launch.sweep, which is in the repository alone.
    points = files("configs/sweeps") | files("configs/experiments")
    expected = files("bipe_jax") | {f"bipe_jax/{name}" for name in files("configs") - points}
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert packed == expected
    assert "bipe_jax/configs/quickstart.py" in packed


@pytest.mark.slow
def test_the_wheel_trains_in_an_empty_environment(wheel, tmp_path):
    """Its dependencies are those of this environment, whose own bipe_jax stays out of sight."""
    venv.create(tmp_path / "venv", symlinks=os.name != "nt")
    python = str(tmp_path / "venv" / "bin" / "python")
    purelib = sysconfig.get_path("purelib", vars={"base": str(tmp_path / "venv")})
    install = [sys.executable, "-m", "pip", f"--python={python}", "install", "--quiet", "--no-deps"]
    subprocess.run([*install, wheel], check=True)
    # The files named *.pth there, such as that of an editable install, are not read from here.
    Path(purelib, "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(*words, program=python):
        line = [program, *words]
        done = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    package = run("-c", "import bipe_jax; print(bipe_jax.__file__)").strip()
    assert Path(package).is_relative_to(tmp_path)
    size = {
        "steps": 2, "batch_size": 4, "schedule.warmup_steps": 1, "model.layers": 1, "model.vocab_size": 512,
        "tokenizer.train_bytes": 200_000, "data.shuffle_blocks": 64, "evaluation.lengths": "(128,)",
        "evaluation.tokens": 64,
    }  # fmt: skip
    overrides = [f"--config.{key}={value}" for key, value in size.items()]
    words = ["--config=quickstart:rope", "--workdir=run", *overrides]
    bipe = str(tmp_path / "venv" / "bin" / "bipe")
    run("train", *words, program=bipe)
    start = json.loads((tmp_path / "run" / "starts" / "1.json").read_text())
    command = start["provenance"]["command"]
    assert command[1:] == ["-m", "bipe_jax.train", *words], "as by python -m"
    assert run("--help", program=bipe).startswith("usage: bipe ")
    assert (tmp_path / "run" / "checkpoints" / "2").is_dir()
    assert (tmp_path / "run" / "evaluation.json").is_file()


def test_the_version_is_told_once():
    import bipe_jax

    if hasattr(bipe_jax, "__version__"):
        assert bipe_jax.__version__ == PROJECT["version"]
    assert importlib.metadata.version("bipe-jax") == PROJECT["version"]
