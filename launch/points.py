"""The points of a sweep: read from its file, applied to a config, and checked."""

import dataclasses
import difflib
import os
import re
from collections.abc import Sequence

from bipe_jax import cli
from bipe_jax.config import FIELDS, file, spec, to_json
from bipe_jax.config.naming import name_of
from bipe_jax.errors import UserError
from bipe_jax.evaluation import ending
from bipe_jax.evaluation.evaluator import Settings, resolve
from bipe_jax.plan import Plan
from bipe_jax.workdir import Workdir, files, json_files
from launch import jobs
from launch.algebra import NAME, Point

_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,79}"


@dataclasses.dataclass(frozen=True)
class Checked:
    """A point that passed all checks.

    Attributes:
      job: its name is that of the point's directory.
      config: as the trainer will read it.
    """

    job: jobs.Job
    config: Plan


def read(path: str) -> list[Point]:
    """The points of a sweep file: what its get_sweep() returns, or the list that a .json file is.

    Raises:
      UserError: the file or function does not exist, raises, or returns no points.
    """
    if not os.path.isfile(path):
        raise UserError(f"--sweep={path}: no such file")
    is_json = path.endswith(".json")
    if is_json:
        try:
            points = json_files.load(path)
        except (OSError, ValueError) as error:
            raise UserError(f"--sweep={path} cannot be read: {error}") from None
    else:
        try:
            points = file.call(path, "get_sweep")
        except UserError as error:
            raise UserError(f"--sweep: {error}") from None
    if not isinstance(points, list) or not all(isinstance(point, dict) for point in points):
        raise UserError(
            f"--sweep={path}: {'it must be' if is_json else 'get_sweep() must return'} a list of dicts of "
            "keys and values"
        )
    if not points:
        raise UserError(f"--sweep={path}: get_sweep() has no points")
    return points


def check(
    points: Sequence[Point],
    config: str,
    overrides: Sequence[tuple[str, str]],
    output: str,
    path: str,
) -> list[Checked]:
    """Applies all points to the config, and checks them as the trainer does.

    Args:
      config: FILE or FILE:ARGUMENT.
      overrides: of all points, pairs of a key and its value's text.
      output: the parent of the points' directories.
      path: the sweep's file, for messages.

    Raises:
      UserError: a key is unknown, a value is wrong, two points are the same, or a directory belongs to
        another config.
    """
    cli.read_config(jobs.Job(config, "", tuple(overrides)).config_arguments())
    checked, numbers = [], {}
    for number, point in enumerate(points, 1):
        where = f"--sweep={path}, point {number} of {len(points)}"
        own = point.get(NAME, "")
        if not isinstance(own, str) or (NAME in point and not re.fullmatch(_NAME, own)):
            raise UserError(f"{where}: the name {own!r} must be letters, digits, '.', '_' and '-'")
        point = {key: value for key, value in point.items() if key != NAME}
        for key in point:
            if key not in FIELDS:
                raise UserError(f"{where}: the config has no key {key!r}{_meant(key)}")
            if any(key == name for name, _ in overrides):
                raise UserError(f"--config.{key} is set by the sweep {path} too: leave it out")
        job = jobs.Job(config, "", (*overrides, *point.items()))
        try:
            name = name_of(point, cli.read_config(job.config_arguments()), own)
            identity = name.rpartition("--")[2]
            if identity in numbers:
                raise UserError(
                    f"it has the same name and config as point {numbers[identity]}: {name}"
                )
            job = dataclasses.replace(job, name=name, workdir=os.path.join(output, name))
            parsed = jobs.check(job)
            ending.of(parsed)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        numbers[identity] = number
        checked.append(Checked(job, parsed))
    return checked


def _meant(key: str) -> str:
    near = difflib.get_close_matches(str(key), FIELDS, n=1)
    return f": did you mean {near[0]!r}?" if near else " (docs/reference/config.md has all keys)"


def record(workdir: str, config) -> None:
    """Writes WORKDIR/point.json, which identifies a point before it has been trained."""
    path = Workdir(workdir).point
    try:
        files.make_directory(workdir)
        files.write_json(path, to_json(config))
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from None


def recorded(workdir: str) -> dict | None:
    """The config of the point, or of the run, in a directory; None if neither exists."""
    directory = Workdir(workdir)
    configs = map(files.read_json, (directory.point, directory.config))
    return next(
        (config for config in configs if config and {"steps", "position"} <= config.keys()), None
    )


def finished(workdir: str, config) -> bool:
    """Whether the last step's checkpoint is complete and evaluated.

    An evaluation at other lengths, on other data or with another context than the config's does not
    count: the trainer, run again, only evaluates.
    """
    last = Workdir(workdir).latest_step()
    of_examples = spec.is_of_examples(config.data.evaluation)
    directory = Workdir(workdir)
    evaluation = files.read_json(directory.answers if of_examples else directory.evaluation)
    if last is None or last < config.steps or not evaluation or evaluation.get("step") != last:
        return False
    if of_examples:
        rows = evaluation.get("results")
        answered = [row.get("source") for row in rows] if isinstance(rows, list) else []
        return answered == [source.text for source in config.evaluated]
    settings = resolve(Settings(), config)
    rows = evaluation.get("results")
    rows = rows if isinstance(rows, list) else []
    lengths = [row.get("length") if isinstance(row, dict) else None for row in rows]
    alike = all(length in settings.lengths for length in lengths)
    complete = all(length in lengths for length in settings.lengths)
    same_text = (evaluation.get("data"), evaluation.get("context")) == (
        settings.data,
        settings.context,
    )
    return same_text and alike and complete
