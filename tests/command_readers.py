"""Readers of this project's commands: each is read by the parser of its program, and nothing is run."""

import argparse
import importlib
import re
import sys
from pathlib import Path

import pytest
from paths import ROOT

from bipe_jax import commands, plan
from bipe_jax.errors import UserError
from bipe_jax.flags import read_config
from bipe_jax.workdir import Workdir, bucket
from launch import jobs, machines, points, restart, supervise, sweep
from launch import list as listing
from launch.gke import jobset
from launch.sky import managed
from launch.slurm import __main__ as slurm
from launch.tpu_vm import __main__ as tpu_vm

MODULES = {
    command.module.removesuffix(".__main__"): name for name, command in commands.COMMANDS.items()
}


class _Parsed(Exception):
    """The flags of a program are right."""


def read(words, monkeypatch):
    """Reads a command of this project by its program's parser, which raises what it raises."""
    # Neither the extra `gcs` nor runs of this machine matter.
    monkeypatch.setattr(bucket, "check", lambda path, flag: None)
    monkeypatch.setattr(Workdir, "read_config", lambda workdir: None)
    program, *words = words
    if program == "bipe":
        name, *words = words
        return read_own(name, words)
    assert (program, words[0]) == ("python", "-m"), program
    _, module, *words = words
    if module in MODULES:
        return read_own(MODULES[module], words)
    if module.startswith("launch."):
        return LAUNCHERS[module](words, monkeypatch)
    return read_other(module, words, monkeypatch)


def read_own(name, words):
    words, _, after = _split(words)
    parser = commands.parser(name)
    if name == "experiments":
        own = [word for word in words if not word.startswith("--config.")]
        read_config(["--config=smoke", *(word for word in words if word not in own)])
        sweep.parser().parse_args(after)
        words = own
    if name in ("train", "preflight"):
        made = parser.parse_with_config(words)[1]
        return check_config(made)
    return parser.parse_args(words)


def check_config(made):
    """Checks a config as a run does, but for plug-ins, which the page that names them makes."""
    try:
        plan.make(made)
    except UserError as error:
        if not re.search("plateau|fade|comma", str(error)):
            raise


def read_other(module, words, monkeypatch):
    """Reads a command whose parser is in its function `main`, which ends there."""
    parse = argparse.ArgumentParser.parse_args

    def parsed(parser, *given):
        parse(parser, *given)
        raise _Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parsed)
    monkeypatch.setattr(sys, "argv", [module, *words])
    path = Path(*module.split("."))
    module += ".__main__" if (ROOT / path).is_dir() else ""
    with pytest.raises(_Parsed):
        importlib.import_module(module).main()


def _split(words):
    where = words.index("--") if "--" in words else len(words)
    return words[:where], words[where : where + 1], words[where + 1 :]


def _job(words):
    jobs.check(machines.job_of(words))


def _machines(parser):
    def read_it(words, monkeypatch):
        args, rest = parser().parse_known_args(words)
        machines.of(args)
        machines.volumes(args, [])
        _job(rest)

    return read_it


def _sweep(words, monkeypatch):
    args, overrides, backend = sweep._parse(words)
    if args.collect is None:
        points.check(points.read(args.sweep), args.config, overrides, args.output, args.sweep)
    if args.on in ("gke", "sky"):
        {"gke": jobset, "sky": managed}[args.on].parser().parse_args(backend)


def _slurm(words, monkeypatch):
    words, _, _ = _split(words)
    _job(slurm.parser().parse_known_args(words)[1])


def _tpu_vm(words, monkeypatch):
    words, dashes, after = _split(words)
    monkeypatch.setattr(tpu_vm, "ALL", dict.fromkeys(tpu_vm.ALL, lambda resource, args: None))
    tpu_vm.main([*words, "--dry-run", *dashes, *after])


def _supervise(words, monkeypatch):
    words, _, after = _split(words)
    supervise.parser().parse_args(words)
    read(after, monkeypatch)


LAUNCHERS = {
    "launch.gke": _machines(jobset.parser),
    "launch.sky": _machines(managed.parser),
    "launch.slurm": _slurm,
    "launch.sweep": _sweep,
    "launch.tpu_vm": _tpu_vm,
    "launch.supervise": _supervise,
    "launch.list": lambda words, _: listing.parser().parse_args(words),
    "launch.restart": lambda words, _: restart.parser().parse_args(words),
    "launch.worker": lambda words, _: read_own("train", words),
}


def is_own(words):
    own = re.compile(r"(bipe_jax|launch|benchmarks|tests)\.")
    return words[0] == "bipe" or (words[:2] == ("python", "-m") and own.match(words[2]))


def why_not(words, monkeypatch):
    """Why a command cannot be read, or ""."""
    try:
        with monkeypatch.context() as patch:
            read(words, patch)
    except (Exception, SystemExit) as error:
        return f"{type(error).__name__}: {error}"
    return ""
