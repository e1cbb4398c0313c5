"""Runs trainings under random faults, and says how many came through: see tests/faults/__init__.py.

Exit status 1 if any was lost. What was lost keeps its directory.
"""

import argparse
import collections
import os
import shutil
import sys
import tempfile
import time
import traceback


def _parse():
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--runs", type=int, default=13)
    parser.add_argument("--seed", type=int, default=0, help="of the first run of each kind")
    parser.add_argument("--kinds", default="", help="separated by commas (all)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--directory", default="", help="to work in (a temporary one)")
    return parser.parse_args()


def _one(root: str, kind: str, seed: int, directory: str) -> tuple[str | None, list[str]]:
    """(what was lost, what happened) of one run."""
    import random

    from tests.faults import comparing, forks, kinds, running, setting

    fault, processes = kinds.KINDS[kind]
    run = running.Run(root, directory, processes)
    try:
        try:
            fault(run, random.Random(f"{kind} {seed}"))
            run.finish()
        finally:
            run.stop()
    except running.Lost as lost:
        return str(lost), run.story
    except Exception:
        return traceback.format_exc(), run.story

    def compare():
        whole = os.path.join(root, f"whole.{processes}", "run")
        if found := comparing.difference(whole, run.workdir, setting.STEPS):
            print(found)
            sys.exit(3)

    output = os.path.join(directory, "comparison")
    if forks.call(compare, output):
        with open(output) as file:
            return file.read().strip(), run.story
    return None, run.story


def _work(root: str, plan: list, todo: int) -> None:
    """Does runs whose numbers it reads from a pipe, and prints a line for each."""
    while number := os.read(todo, 4):
        kind, seed = plan[int.from_bytes(number)]
        directory = os.path.join(root, f"{kind}.{seed}")
        shutil.rmtree(directory, ignore_errors=True)  # of an earlier call
        begun = time.monotonic()
        lost, story = _one(root, kind, seed, directory)
        took = time.monotonic() - begun
        line = f"{kind} --seed={seed}: {'LOST' if lost else 'survived'} in {took:.0f} s ({'; '.join(story)})"
        if lost:
            line += f"\n  {lost}\n  {directory}; python -m tests.faults --kinds={kind} --seed={seed} --runs=1"
        else:
            shutil.rmtree(directory)
        # One write, so that the lines of several workers do not mix.
        os.write(1, f"{line}\n".encode())
        with open(os.path.join(root, "outcomes"), "a") as file:
            file.write(f"{kind} {'lost' if lost else 'survived'}\n")


def main() -> int:
    args = _parse()
    root = os.path.abspath(args.directory or tempfile.mkdtemp(prefix="bipe_faults_"))
    os.makedirs(root, exist_ok=True)
    from tests.faults import environment

    os.environ.update(environment(root))
    from tests.faults import forks, kinds, running, setting

    chosen = args.kinds.split(",") if args.kinds else list(kinds.KINDS)
    if unknown := set(chosen) - kinds.KINDS.keys():
        print(f"--kinds: {sorted(unknown)} unknown: {', '.join(kinds.KINDS)}", file=sys.stderr)
        return 2
    plan = [(chosen[i % len(chosen)], args.seed + i // len(chosen)) for i in range(args.runs)]
    assert forks.threads() == 1, "forking would not be sound"

    def done(function, name):
        output = os.path.join(root, f"log.{name}")
        if forks.call(function, output):
            with open(output) as file:
                sys.exit(f"{name}: {file.read()}")

    if not os.path.exists(os.path.join(root, "tokenizer.model")):
        done(lambda: setting.make(root), "data")
    for processes in sorted({kinds.KINDS[kind][1] for kind, _ in plan}):
        whole = os.path.join(root, f"whole.{processes}")
        if not os.path.exists(os.path.join(whole, "seconds")):
            shutil.rmtree(whole, ignore_errors=True)
            done(lambda n=processes: running.undisturbed(root, n), f"whole.{processes}")
    outcomes = os.path.join(root, "outcomes")
    open(outcomes, "w").close()

    todo, numbers = os.pipe()
    for number in range(len(plan)):
        os.write(numbers, number.to_bytes(4))
    workers = []
    for _ in range(args.jobs):
        if not (pid := os.fork()):
            os.close(numbers)
            try:
                _work(root, plan, todo)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        workers.append(pid)
    os.close(numbers)
    failed = [os.waitpid(pid, 0)[1] for pid in workers]
    with open(outcomes) as file:
        counted = collections.Counter(tuple(line.split()) for line in file)
    print(f"\n{'fault':16}{'survived':>10}{'lost':>6}")
    for kind in dict.fromkeys(kind for kind, _ in plan):
        print(f"{kind:16}{counted[kind, 'survived']:10}{counted[kind, 'lost']:6}")
    survived = sum(n for (_, outcome), n in counted.items() if outcome == "survived")
    print(f"{'all':16}{survived:10}{sum(counted.values()) - survived:6}")
    if any(failed) or survived < len(plan):
        print(f"what was lost is in {root}")
        return 1
    if not args.directory:
        shutil.rmtree(root)
    return 0


if __name__ == "__main__":
    sys.exit(main())
