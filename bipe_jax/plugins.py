"""Plug-ins: kinds, segment rules, sources and tasks that other packages add by entry points.

A package names what it adds in its pyproject.toml, see docs/how-to/plugins.md:

    [project.entry-points."bipe_jax.kinds"]
    triangle = "bipe_triangle:Triangle"

A plug-in is imported when a config or a flag names it, so that a broken one harms no other run.
"""

import dataclasses
import functools
import importlib.metadata
import sys
from collections.abc import Collection, Iterable, Mapping
from typing import Any, NoReturn

from bipe_jax.errors import UserError

KINDS, RULES, SOURCES, TASKS = "kinds", "rules", "sources", "tasks"
# Group of entry points, without "bipe_jax." -> what a message calls one of them.
_WORDS = {KINDS: "kind", RULES: "segment rule", SOURCES: "source", TASKS: "task"}


@dataclasses.dataclass(frozen=True)
class Plugin:
    """A plug-in of an installed package.

    Attributes:
      group: KINDS, RULES, SOURCES or TASKS. name: by which configs name it.
      package, version: of the distribution.
      value: what the entry point leads to.
    """

    group: str
    name: str
    package: str
    version: str
    value: Any = dataclasses.field(compare=False, default=None)

    def refuse(self, reason: str) -> NoReturn:
        """Raises UserError: one line that names the package, and why it cannot be used."""
        reason = " ".join(reason.split())[:300]
        raise UserError(
            f"the package {self.package} {self.version}: its {_WORDS[self.group]} {self.name!r} {reason}: "
            "repair the package, or uninstall it"
        )

    def call(self, *arguments: Any) -> Any:
        """What the plug-in, a function, returns. Raises UserError, whatever the function raises."""
        try:
            return self.value(*arguments)
        except UserError:
            raise
        except Exception as error:
            try:
                self.refuse(f"raises {type(error).__name__}: {error}")
            except UserError as line:
                raise line from error

    def to_json(self) -> dict[str, str]:
        """What a checkpoint says of it."""
        return {name: getattr(self, name) for name in ("group", "name", "package", "version")}


def names(group: str) -> tuple[str, ...]:
    """The names of the installed plug-ins of a group. None is imported."""
    return tuple(_installed(group, tuple(sys.path)))


@functools.cache
def _installed(
    group: str, path: tuple[str, ...]
) -> Mapping[str, list[importlib.metadata.EntryPoint]]:
    """Name -> entry points; of each package one, even if it is found twice. The path is that of imports."""
    found: dict[str, dict[str, importlib.metadata.EntryPoint]] = {}
    for entry in importlib.metadata.entry_points(group=f"bipe_jax.{group}"):
        found.setdefault(entry.name, {}).setdefault(_package(entry)[0], entry)
    return {name: list(of_packages.values()) for name, of_packages in sorted(found.items())}


def _package(entry: importlib.metadata.EntryPoint) -> tuple[str, str]:
    """Name and version of the distribution of an entry point."""
    assert entry.dist is not None  # since it was found in one
    return entry.dist.name, entry.dist.version


def find(group: str, name: str, own: Collection[str]) -> Plugin | None:
    """The plug-in of a name, imported; None if there is none.

    Args:
      own: the names that bipe_jax itself has in the group.

    Raises:
      UserError: it cannot be imported; or two packages have the name, or a package and bipe_jax.
    """
    entries = _installed(group, tuple(sys.path)).get(name, [])
    if not entries:
        return None
    plugin = Plugin(group, name, *_package(entries[0]))
    if name in own:
        plugin.refuse("has the name of one of bipe_jax's own")
    if len(entries) > 1:
        plugin.refuse(f"has the name of one of the package {_package(entries[1])[0]}")
    try:
        value = entries[0].load()
    except (Exception, SystemExit) as error:  # it is other people's code
        plugin.refuse(f"cannot be imported: {type(error).__name__}: {error}")
    return dataclasses.replace(plugin, value=value)


def check_installed(saved: Iterable[Mapping[str, str]]) -> None:
    """Checks that the plug-ins of `Plugin.to_json` are installed, in any version.

    Sources are not needed to read a checkpoint.

    Raises:
      UserError: one is not.
    """
    for one in saved:
        group, name = one["group"], one["name"]
        if group != SOURCES and name not in names(group):
            raise UserError(
                f"it needs the {_WORDS[group]} {name!r} of the package {one['package']} "
                f"{one['version']}, which is not installed: pip install {one['package']}"
            )
