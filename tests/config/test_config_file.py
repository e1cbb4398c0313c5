"""Config files: which one --config names, what they may import, and one line for what is wrong."""

import os

import pytest
from paths import ROOT

from bipe_jax import cli
from bipe_jax.config import file as config_file
from bipe_jax.errors import UserError
from configs import quickstart, smoke


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """The current directory: not the repository."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(path, body):
    path.write_text(body)
    return str(path)


def test_a_file_and_a_shipped_config_of_that_name_are_the_same(elsewhere):
    expected = smoke.get_config()
    assert config_file.load("smoke") == config_file.load(f"{ROOT}/configs/smoke.py") == expected
    assert config_file.load("quickstart:rope") == quickstart.get_config("rope") != expected


def test_the_command_line_takes_a_shipped_config_and_overrides(elsewhere):
    line = ["--config=smoke:nope", "--config.steps=7", "--config.optimizer.learning_rate=1"]
    config = cli.read_config(line)
    assert (config.steps, config.optimizer.learning_rate) == (7, 1.0)
    assert config.position.to_dict() == smoke.get_config("nope").position.to_dict()
    apart = cli.read_config(["--config", "smoke:nope", "--config.steps", "7", line[2]])
    assert apart == config
    # An override may stand before the config.
    assert cli.read_config([*line[1:], line[0]]) == config


def test_a_shipped_config_is_run_again_for_each_command_line():
    cli.read_config(["--config=smoke", "--config.steps=7"])
    assert cli.read_config(["--config=smoke"]).steps == smoke.get_config().steps


def test_a_file_imports_those_beside_it_as_they_are_now(elsewhere):
    mine = "from . import mine_base\ndef get_config():\n  return mine_base.get_config()\n"
    base = "from bipe_jax.config import defaults\n\ndef get_config():\n"
    base += "  c = defaults()\n  c.steps = {}\n  return c\n"
    for directory, steps in (("one", 3), ("two", 41), ("one", 5)):
        (elsewhere / directory).mkdir(exist_ok=True)
        path = write(elsewhere / directory / "mine.py", mine)
        write(elsewhere / directory / "mine_base.py", base.format(steps))
        assert config_file.load(path).steps == steps


def test_a_file_may_import_the_repositorys_configs(tmp_path):
    path = write(tmp_path / "my-config.py", "from configs.smoke import get_config\n")
    assert config_file.load(f"{path}:rope") == smoke.get_config("rope")


@pytest.mark.parametrize(
    ("name", "body", "message"),
    [
        ("x.py", "def get_config():\n  return {}.steps\n", "x.py, line 2: AttributeError: 'dict'"),
        ("x.py", "import nothing_of_that_name\n", "x.py, line 1: ModuleNotFoundError: No module"),
        ("x.py", "\ndef get_config(:\n", "x.py, line 2: SyntaxError: invalid syntax"),
        ("x.py", "def get_config():\n  return {}['a']\n", "x.py, line 2: KeyError: 'a'"),
        ("x.py", "def get_config():\n  pass\n", "x.py: get_config() must return a ConfigDict, not N"),
        ("x.py", "steps = 3\n", "x.py has no function get_config()"),
        ("x.py:rope", "def get_config():\n  pass\n", "x.py: TypeError: get_config() takes 0"),
        ("x.txt", "", "x.txt must be a Python file"),
        ("./x.py", "\ndef get_config():\n  raise OSError('boom')\n", "./x.py, line 3: OSError: boom"),
        ("x.py", "import sys\nsys.exit('boom')\n", "x.py, line 2: SystemExit: boom"),
        ("x.py", "from bipe_jax.errors import UserError\nraise UserError('a\\nb')\n", "x.py, line 2: a b"),
        ("x.py", "class E(Exception):\n  def __str__(self): 1 / 0\nraise E\n", "x.py, line 3: E: (an error"),
        ("x.py", "def get_config():\n  return 3\n", "x.py: get_config() must return a ConfigDict, not int"),
        ("x.py", "get_config = 3\n", "x.py: TypeError: 'int' object is not callable"),
        ("x.py", "def get_config():\n  return get_config()\n", "x.py, line 2: RecursionError: maximum"),
        ("x.py", "def get_config():\n  return " + "(" * 999, "x.py, line 2: SyntaxError: too many nested"),
        ("x.py", "\0", "x.py: SyntaxError: source code string cannot contain null bytes"),
        (
            "x.py",
            "from bipe_jax.config import defaults\n\ndef get_config():\n  c = defaults()\n  x = ()\n"
            "  for _ in range(100_000):\n    x = (x,)\n  c.position.relative = x\n  return c\n",
            "x.py: what get_config() returns cannot be used: it is nested more than 64 deep",
        ),
        (
            "x.py",
            "from bipe_jax.config import defaults\n\ndef get_config():\n  c = defaults()\n"
            "  x = []\n  x += [x, x]\n  c.data.sets = x\n  return c\n",
            "x.py: what get_config() returns cannot be used: it is nested more than 64 deep",
        ),
        (
            "x.py",
            "from bipe_jax.config import defaults\n\ndef get_config():\n  c = defaults()\n"
            "  c.batch_size = c.get_ref('steps') // 0\n  return c\n",
            "x.py, line 5: ZeroDivisionError: integer division or modulo by zero",
        ),
    ],
)  # fmt: skip
def test_what_is_wrong_in_a_file_is_one_line_that_names_it(elsewhere, name, body, message):
    write(elsewhere / name.partition(":")[0], body)
    with pytest.raises(UserError) as caught:
        cli.read_config([f"--config={name}"])
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--config=smok"],
            "no shipped config 'smok' .*: use one of alibi_151m, base, .*smoke, or a",
        ),
        (["--config="], "no shipped config ''"),
        (["--config=configs/smoke.py"], "no file 'configs/smoke.py'"),
        (["--config=smoke.py"], "no file 'smoke.py'"),
        (["--config=smoke", "--config.stepz=3"], "config has no field 'stepz'"),
        (["--config=smoke", "--config.steps=many"], "--config.steps=many: invalid literal"),
        (["--config.steps=3"], "--config=FILE is needed"),
        (["--config=smoke", "3"], "unexpected argument '3'"),
        ([], "--config=FILE is needed"),
    ],
)
def test_a_wrong_command_line_is_one_line(elsewhere, arguments, message):
    with pytest.raises(UserError, match=message) as caught:
        cli.read_config(arguments)
    assert "\n" not in str(caught.value)


def test_an_error_in_a_file_beside_it_names_that_file(elsewhere):
    path = write(elsewhere / "mine.py", "from . import helper\n")
    write(elsewhere / "helper.py", "\n\n1 / 0\n")
    with pytest.raises(UserError) as caught:
        config_file.load(path)
    assert (
        str(caught.value) == f"{elsewhere}/helper.py, line 3: ZeroDivisionError: division by zero"
    )


def test_every_shipped_config_is_found_by_its_name(elsewhere):
    names = [file.stem for file in (ROOT / "configs").glob("*.py")]
    assert names
    for name in names:
        path, argument = config_file.find(f"{name}:x")
        assert (os.path.basename(path), argument) == (f"{name}.py", "x")
        assert config_file.find(name) == (path, None)
