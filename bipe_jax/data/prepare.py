"""Tokenises a corpus in advance of training.

python -m bipe_jax.data.prepare --input='shards/*.jsonl.zst' --output=DIR --tokenizer=FILE.model \
--length=1024

DIR becomes a TFDS dataset of blocks in ArrayRecord files, with one split per set of the corpus. The
source `prepared:DIR` trains on it; DIR/bipe.json describes it. After a stop, the same command resumes.
"""

import contextlib
import hashlib
import json
import logging
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NoReturn

import tqdm
from etils import epath

from bipe_jax import cli, commands
from bipe_jax.config.spec import OF_EXAMPLES, parse_source
from bipe_jax.data import held_out, identity, jobs, on_beam, sources, tokenizer, vocabulary
from bipe_jax.data.prepared import COMPLETE, FORMAT, PREPARING
from bipe_jax.data.records import describe_for_tfds, file_name, layout, writing
from bipe_jax.errors import UserError
from bipe_jax.hardware import cores
from bipe_jax.segments import segmenters as finder
from bipe_jax.workdir import json_files
from bipe_jax.workdir.files import locked

_LOG = logging.getLogger("bipe_jax.data.prepare")

_LONGEST_NAME = 64  # characters: file names contain it

# Name of a setting -> its flag.
_FLAGS = {
    "input": "--input",
    "source_shards": "--input (its shards)",
    "shards": "--input (the content of its shards)",
    "sets": "--sets",
    "sequence_length": "--length",
    "packing": "--packing",
    "segmenters": "--segmenters",
    "vocab_size": "--tokenizer",
    "tokenizer_sha256": "--tokenizer",
}


def prepare(input: str, output: str, tokenizer_path: str, length: int, *, packing: str = "concat",
            sets: Sequence[str] = (), workers: int = 0, on_error: str = "raise",
            max_bad_share: float = 0.0, segmenters: Sequence[str] = (), runner: str = "",
            beam_options: Sequence[str] = ()) -> dict:  # fmt: skip
    """Writes the blocks of a source to a directory, or resumes that.

    Args:
      input: a source, see `config.spec`. output: the directory.
      tokenizer_path: a SentencePiece model.
      length: of the model's sequences; blocks have one token more.
      packing: one of `config.fields.PACKINGS`. sets: names of sets to keep; () keeps all.
      workers: number of processes; 0: one per core; 1: this process.
      on_error, max_bad_share: see `sources.Policy`.
      segmenters: of the levels of segments, see `segments.segmenters_of`; () for none.
      runner: of Apache Beam, "" for none; beam_options: its options.

    Returns:
      The contents of DIR/bipe.json.

    Raises:
      UserError: an argument or the source is wrong, or `output` was begun with other settings.
    """
    options = on_beam.options(runner, beam_options) if runner else None
    tokens = tokenizer.load(tokenizer_path)
    for name in filter(None, segmenters):
        finder.check(name, "--segmenters")
    segmenters = [finder.of_level(name, level) for level, name in enumerate(segmenters)]
    if parse_source(input).kind in OF_EXAMPLES:
        raise UserError(f"--input={input}: examples are not prepared: train on them as they are")
    plan = jobs.Plan(
        input, output, length + 1, packing, tokens.vocab_size, tuple(sets), on_error, max_bad_share,
        tuple(segmenters),
    )  # fmt: skip
    policy = sources.Policy(on_error, max_bad_share)
    source = sources.open_source(parse_source(input), plan.sets, policy)
    shards = identity.of_source(parse_source(input))
    settings = {
        "input": input,
        "source_shards": source.shards,
        "shards": [[shard.path, shard.size, shard.digest] for shard in shards],
        "sets": list(plan.sets),
        "sequence_length": length,
        "packing": packing,
        "segmenters": list(segmenters),
        "vocab_size": tokens.vocab_size,
        "tokenizer_sha256": hashlib.sha256(tokens.model).hexdigest(),
    }
    with _alone(plan):
        if done := _begin(plan, settings):
            _clear(plan)
            _LOG.info(f"{output} is complete already")
            return done
        for remark in vocabulary.remarks_on(tokens, [source.source], plan.sets, policy):
            _LOG.info(remark)
        with writing(output):
            plan.path("tokenizer.model").write_bytes(tokens.model)
        count = jobs.count(len(source.shards))
        todo = [i for i in range(count) if not plan.file(i, "json").exists()]
        if len(todo) < count:
            _LOG.info(f"Resuming {output}: {count - len(todo)} of {count} jobs are done")
        if runner:
            on_beam.run_all(plan, todo, runner, options)
        elif todo:
            _run_here(plan, todo, workers or cores())
        return _finish(plan, settings, count)


@contextlib.contextmanager
def _alone(plan: jobs.Plan) -> Iterator[None]:
    """Locks a local directory, and removes the temporary files of a killed process."""
    if not plan.local:
        yield
        return
    with writing(plan.output):
        os.makedirs(plan.output, exist_ok=True)
    with locked(plan.output, f"another process is preparing {plan.output}: wait for it"):
        for path in plan.path("parts").glob("tmp*"):
            path.rmtree(missing_ok=True)
        yield


def _run_here(plan: jobs.Plan, numbers: list[int], workers: int) -> None:
    documents = 0
    with tqdm.tqdm(desc=f"{len(numbers)} jobs", unit=" tokens", unit_scale=True) as bar:

        def report(more_documents, more_tokens):
            nonlocal documents
            documents += more_documents
            bar.set_postfix_str(f"{documents:,} documents", refresh=False)
            bar.update(more_tokens)

        jobs.run_all(plan, numbers, workers, report)


def _begin(plan: jobs.Plan, settings: dict) -> dict | None:
    """Makes the directory, or checks that it was begun with the same settings.

    Returns:
      The contents of bipe.json, or None if the directory is not complete.
    """
    complete, preparing = plan.path(COMPLETE), plan.path(PREPARING)
    for path in (complete, preparing):
        try:
            before = json_files.parse(path.read_text())
            old, new = _decisive(before["settings"], settings)
            different = [name for name, value in new.items() if old[name] != value]
        except FileNotFoundError:
            continue
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path} is damaged: delete {plan.output} first") from None
        except (OSError, ImportError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"{path} cannot be read: {reason}") from None
        for name in different:
            _refuse(plan, name, old[name], new[name])
        return before if path == complete else None
    with writing(plan.output):
        if plan.path().exists() and not all(p.suffix == ".tmp" for p in plan.path().iterdir()):
            raise UserError(
                f"--output={plan.output} holds files that are no preparation: name a new directory"
            )
        plan.path().mkdir(parents=True, exist_ok=True)
        _write_json(preparing, {"format": FORMAT, "settings": settings})
    return None


def _decisive(old: dict, new: dict) -> tuple[dict, dict]:
    """The settings that decide what is written: those of a directory, and now.

    If the shards have the same content, their paths do not count. A directory of an earlier version has
    the paths alone.
    """
    old = {"segmenters": [], **old}  # of an earlier version
    if "shards" not in old:
        return old, {name: value for name, value in new.items() if name != "shards"}
    old, new = ({**s, "shards": [shard[1:] for shard in s["shards"]]} for s in (old, new))
    if old["shards"] == new["shards"]:
        new |= {name: old[name] for name in ("input", "source_shards")}
    return old, new


def _clear(plan: jobs.Plan) -> None:
    """Removes the files that a complete directory does not need."""
    with writing(plan.output):
        plan.path("parts").rmtree(missing_ok=True)
        plan.path(PREPARING).unlink(missing_ok=True)


def _refuse(plan: jobs.Plan, name: str, before: Any, now: Any) -> NoReturn:
    """Raises UserError for a setting that differs from the one that the directory was begun with."""
    difference = f"{now!r}, but {plan.output} was begun with {before!r}"
    if name in ("source_shards", "shards", "tokenizer_sha256"):  # too long to show
        difference = f"not what {plan.output} was begun with"
    raise UserError(f"{_FLAGS[name]} is {difference}: use that, or another --output")


def _write_json(path: epath.Path, value: dict) -> None:
    scratch = path.with_name(path.name + ".tmp")
    scratch.write_text(json.dumps(value, indent=1, ensure_ascii=False))
    scratch.replace(path)


def split_names(sets: Iterable[str]) -> dict[str, str]:
    """Set -> the name of its split, of 64 letters, digits and _, unique without regard to case."""
    names, taken = {}, {"all"}  # TFDS's name for all splits
    for name in sorted(sets):
        base = re.sub(r"\W+", "_", name, flags=re.ASCII).strip("_")
        split = base = base[:_LONGEST_NAME] or "set"
        number = 2
        while split.lower() in taken:
            split, number = f"{base}_{number}", number + 1
        taken.add(split.lower())
        names[name] = split
    return names


def _finish(plan: jobs.Plan, settings: dict, count: int) -> dict:
    """Renames the files of the jobs as TFDS requires, and describes them; may be repeated."""
    if missing := [i for i in range(count) if not plan.file(i, "json").exists()]:
        raise UserError(f"{len(missing)} of {count} jobs are not done: run the same command again")
    results = [json.loads(plan.file(i, "json").read_text()) for i in range(count)]
    lost, shards = sum(r["lost_shards"] for r in results), len(settings["source_shards"])
    if lost > plan.max_bad_share * shards:
        raise UserError(
            f"{lost} of {shards} shards of {plan.input} could not be read (completely), more than "
            f"--max_bad_share={plan.max_bad_share:g}"
        )
    splits = split_names({name for r in results for name in r["sets"]})
    if not splits:
        raise sources.no_documents(parse_source(plan.input), plan.sets)
    sets = {}
    with writing(plan.output):
        for name, split in splits.items():
            of_set = [(i, r["sets"][name]) for i, r in enumerate(results) if name in r["sets"]]
            files = [file_name(split, i, len(of_set)) for i in range(len(of_set))]
            for file, (job, counts) in zip(files, of_set, strict=True):
                part = plan.file(job, counts["file"])
                if part.exists():
                    part.replace(plan.path(file))
                elif not plan.path(file).exists():
                    raise UserError(f"{part} is gone: delete {plan.output} and prepare it again")
            sets[name] = {"split": split}
            for _, counts in of_set:  # a job of an earlier version has not counted them
                counts.setdefault("piece_bytes", counts["text_bytes"])
            for key in ("documents", "tokens", "text_bytes", "piece_bytes", "blocks", "file_bytes"):
                sets[name][key] = sum(counts[key] for _, counts in of_set)
            sets[name] |= {
                "files": files,
                "file_blocks": [counts["blocks"] for _, counts in of_set],
            }
        levels = len(plan.segmenters)
        describe_for_tfds(plan.path(), plan.length, plan.vocab_size, levels, list(sets.values()))
        record, fields = layout(plan.length, plan.vocab_size, levels)
        kinds = sorted({kind for r in results for kind in r["faults"]})
        description = {
            "format": FORMAT,
            "settings": settings,
            "record": {"bytes": len(record), **fields},
            "sets": sets,
            # By which the text is recognised where it is evaluated.
            "documents": [
                [sample.path, sorted(d for d in sample.digests if d[0] in sets)]
                for sample in held_out.sample(parse_source(plan.input))
            ],
            "faults": {kind: sum(r["faults"].get(kind, 0) for r in results) for kind in kinds},
        }
        _write_json(plan.path(COMPLETE), description)
    _clear(plan)
    blocks, tokens, documents = (
        sum(s[key] for s in sets.values()) for key in ("blocks", "tokens", "documents")
    )
    faults = "".join(f"; {n} {kind}" for kind, n in description["faults"].items())
    _LOG.info(
        f"Wrote {plan.output}: {blocks:,} blocks of {tokens:,} tokens of {documents:,} documents in "
        f"{len(sets)} set(s){faults}"
    )
    return description


def main():
    parser = commands.parser("prepare")
    args, rest = parser.parse_known_args()
    if not args.runner:  # whose options these are
        parser.refuse(rest)
    for name, low in (("length", 2), ("workers", 0)):
        if getattr(args, name) < low:
            raise UserError(f"--{name}={getattr(args, name)} must be at least {low}")
    if not 0 <= args.max_bad_share <= 1:
        raise UserError(f"--max_bad_share={args.max_bad_share:g} must be from 0 to 1")
    try:
        prepare(
            args.input,
            args.output,
            args.tokenizer,
            args.length,
            packing=args.packing,
            sets=args.sets,
            workers=args.workers,
            on_error=args.on_error,
            max_bad_share=args.max_bad_share,
            segmenters=tuple(args.segmenters.split(",")) if args.segmenters else (),
            runner=args.runner,
            beam_options=rest,
        )
    except KeyboardInterrupt:
        raise UserError("stopped: run the same command again to resume") from None


if __name__ == "__main__":
    with cli.user_errors():
        main()
