"""Plug-ins: the package of docs/how-to/plugins.md, installed by pip, and packages that are broken."""

import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from paths import ROOT

import bipe_jax
from bipe_jax import checkpoint, plan, plugins
from bipe_jax.config import parse, spec
from bipe_jax.data import identity, sources
from bipe_jax.errors import UserError
from bipe_jax.positions import registry
from bipe_jax.segments import check_rule, resolve
from bipe_jax.tasks import generators
from bipe_jax.tasks.evaluation import Settings, evaluate

PAGE = ROOT / "docs" / "how-to" / "plugins.md"


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The directory that pip has installed the page's package into."""
    directory = tmp_path_factory.mktemp("package")
    page = PAGE.read_text(encoding="utf-8")
    for name, kind in (("pyproject.toml", "toml"), ("my_bipe.py", "python")):
        (text,) = re.findall(rf"`{re.escape(name)}`:\n\n```{kind}\n(.*?)```\n", page, re.DOTALL)
        (directory / name).write_text(text)
    target = directory / "target"
    line = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    done = subprocess.run([*line, f"--target={target}", directory], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (target / "my_bipe-0.1.dist-info" / "entry_points.txt").is_file()
    return target


@pytest.fixture
def registered():
    """What configs add to the registry is removed again."""
    before = dict(registry.RELATIVE), dict(registry.ABSOLUTE)
    yield
    for kinds, known in zip((registry.RELATIVE, registry.ABSOLUTE), before, strict=True):
        kinds.clear()
        kinds.update(known)


@pytest.fixture
def package(installed, monkeypatch, registered):
    monkeypatch.syspath_prepend(str(installed))


def with_plugins(config):
    config.steps, config.schedule.warmup_steps, config.checkpoint.every = 4, 1, 2
    config.position.absolute = ()
    config.position.relative = (("plateau", "segment", ("width", 8)), ("rope", "position"))
    config.segments.rule = "comma"
    config.data.train = "squares:4"
    return config


def refused(call, *arguments):
    with pytest.raises(UserError) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.slow
def test_a_model_trains_resumes_and_answers_with_a_packages_plugins(
    config, package, tmp_path, monkeypatch
):
    workdir = str(tmp_path / "run")
    config = with_plugins(config)
    assert not bipe_jax.train(config, workdir, stop_at=2)
    assert bipe_jax.train(config, workdir)
    meta, params = checkpoint.load(workdir)
    assert meta.step == 4
    (slope,) = (
        leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
        if "plateau_segment" in jax.tree_util.keystr(path)
    )
    pieces = meta.tokenizer.pieces()
    commas = tuple(i for i, piece in enumerate(pieces) if piece.endswith(","))
    assert meta.config.rule.separators == commas != ()
    assert slope.shape == (config.model.heads,) and jnp.all(slope != 0.1)  # it has learned
    assert [(p.group, p.name, p.package, p.version) for p in meta.config.plugins] == [
        ("kinds", "plateau", "my-bipe", "0.1"),
        ("rules", "comma", "my-bipe", "0.1"),
        ("sources", "squares", "my-bipe", "0.1"),
    ]
    asked = Settings(("color",), (64,), (0.5,), 2)
    result = evaluate(workdir, asked, str(tmp_path / "out"))
    assert [row["task"] for row in result["results"]] == ["color"]
    assert "The color is" in result["examples"][0]["prompt"]

    # Without the package.
    monkeypatch.undo()
    registry.RELATIVE.pop("plateau")
    line = refused(bipe_jax.load, workdir)
    assert line == (
        f"checkpoint {workdir}/checkpoints/4: it needs the kind 'plateau' of the package my-bipe 0.1, "
        "which is not installed: pip install my-bipe"
    )
    assert "kind 'plateau' is unknown" in refused(bipe_jax.train, config, workdir)


def test_a_checkpoint_needs_its_kinds_and_rules_and_not_its_sources():
    saved = {"name": "x", "package": "a-package", "version": "1"}
    plugins.check_installed([saved | {"group": "sources"}])
    assert "the segment rule 'x' of the package a-package 1" in refused(
        plugins.check_installed, [saved | {"group": "rules"}]
    )


def test_the_bias_is_the_formula(package):
    config = parse(with_plugins(plan.configs.defaults()))
    plan.make(config)  # registers the kind
    kind = registry.RELATIVE["plateau"](config, "segment", None, width=3)
    query, key = jnp.array([[7]]), jnp.array([[0, 4, 5, 7]])
    bias = kind.bias(query, key, jnp.arange(config.model.heads))
    assert bias.shape == (1, config.model.heads, 1, 4)
    assert jnp.allclose(bias[0, 0, 0], jnp.array([-0.3, -0.3, -0.2, 0.0]))


def test_a_source_is_read_from_any_place(package):
    source = spec.parse_source("squares:2")
    assert [shard.path for shard in identity.of_source(source)] == ["squares[0]", "squares[1]"]
    opened = sources.open_source(source)
    read = list(opened.read(1))
    assert len(read) == 8 and read[0][0]["set"] == "squares"
    assert read[0][0]["text"].startswith("The square of 100 is 10000,")
    cursor = read[2][1]
    assert [document["text"] for document, _ in opened.read(1, cursor)] == [
        document["text"] for document, _ in read[3:]
    ]
    assert "raises ValueError: invalid literal" in refused(
        identity.of_source, spec.parse_source("squares:x")
    )


def test_names_of_plugins_are_suggested(package):
    assert "(did you mean 'comma'?): use one of sentence" in refused(check_rule, "coma")
    assert "(did you mean 'color'?)" in refused(generators.task, "colour")
    position = (("platau", "position"),)
    parse_entries = registry.parse_entries
    line = refused(parse_entries, "position.relative", position, ("position",), 2)
    assert "(did you mean 'plateau'?): use one of rope" in line
    assert "(did you mean 'squares'?)" in refused(identity.of_source, spec.parse_source("square:2"))


def test_of_a_kind_that_is_not_installed_a_line_says_so():
    assert "(and no installed package has a source 'cubes')" in refused(
        identity.of_source, spec.parse_source("cubes:2")
    )


@pytest.fixture
def broken(tmp_path, monkeypatch, registered):
    """Installs packages whose module has a text, with one entry point each, as installers write them."""

    def install(name, group, entry, text="", value="value"):
        module = name.replace("-", "_")
        (tmp_path / f"{module}.py").write_text(text)
        information = tmp_path / f"{module}-2.0.dist-info"
        information.mkdir()
        (information / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {name}\nVersion: 2.0\n"
        )
        points = f"[bipe_jax.{group}]\n{entry} = {module}:{value}\n"
        (information / "entry_points.txt").write_text(points)

    yield install
    for path in tmp_path.glob("*.py"):
        sys.modules.pop(path.stem, None)


@pytest.fixture
def on_path(tmp_path, monkeypatch):
    return lambda: monkeypatch.syspath_prepend(str(tmp_path))


def of_kind(name):
    return registry.parse_entries("position.relative", ((name, "position"),), ("position",), 2)


def of_rule(name):
    return resolve(name, ["a", ","])


def of_source(name):
    return sources.open_source(spec.parse_source(f"{name}:1"))


@pytest.mark.parametrize(
    ("group", "use", "text", "reason"),
    [
        (
            "kinds",
            of_kind,
            "import not_there",
            "cannot be imported: ModuleNotFoundError: No module",
        ),
        ("kinds", of_kind, "def f(:", "cannot be imported: SyntaxError: invalid syntax"),
        ("kinds", of_kind, "import sys\nsys.exit(3)", "cannot be imported: SystemExit: 3"),
        ("kinds", of_kind, "", "cannot be imported: AttributeError: module 'bad_one' has no attr"),
        ("kinds", of_kind, "value = 3", "is no subclass of bipe_jax.positions.kind.Absolute or"),
        ("rules", of_rule, "value = 3", "raises TypeError: 'int' object is not callable"),
        ("rules", of_rule, "value = lambda p, b: p[99]", "raises IndexError: list index out of"),
        (
            "rules",
            of_rule,
            "value = lambda p, b: {1}",
            "gives a set, and no bipe_jax.segments.Rule",
        ),
        ("sources", of_source, "value = lambda path: 3", "must give (shards, read)"),
        ("sources", of_source, "value = lambda path: (['a'], print)", "must give (shards, read)"),
        ("tasks", generators.task, "value = 3", "is no bipe_jax.tasks.generators.Family"),
    ],
)
def test_a_broken_plugin_is_one_line_that_names_the_package(
    broken, on_path, group, use, text, reason
):
    broken("bad-one", group, "odd", text)
    on_path()
    line = refused(use, "odd")
    assert line.startswith("the package bad-one 2.0: its ") and reason in line
    assert line.endswith(": repair the package, or uninstall it")


@pytest.mark.parametrize(
    ("group", "use", "own"),
    [
        ("kinds", of_kind, "rope"),
        ("rules", check_rule, "sentence"),
        ("sources", of_source, "tfds"),
        ("tasks", generators.task, "passkey"),
    ],
)
def test_a_name_of_bipe_jaxs_own_is_refused(broken, on_path, group, use, own):
    broken("bad-one", group, own, "raise RuntimeError('imported')")
    on_path()
    line = refused(use, own)
    assert line.startswith("the package bad-one 2.0") and "one of bipe_jax's own" in line


def test_a_name_that_two_packages_have_is_refused(broken, on_path):
    broken("bad-one", "rules", "odd", "value = 3")
    broken("bad-two", "rules", "odd", "value = 3")
    on_path()
    line = refused(check_rule, "odd")
    assert "bad-one" in line and "bad-two" in line


def test_a_broken_package_harms_no_config_that_does_not_name_it(broken, on_path, config):
    broken("bad-one", "kinds", "odd", "raise RuntimeError('imported')")
    on_path()
    assert plan.make(config).plugins == ()
    assert "odd" in plugins.names("kinds") and "bad_one" not in sys.modules
