"""Times several programs in turn; used by step.py and attention.py."""

import gc
import time
from collections.abc import Callable
from typing import NamedTuple

_WARM_UP = 2


class Program(NamedTuple):
    run: Callable  # runs it once and waits for it
    memory: int | None  # bytes at its peak, where that is known


class Timed(NamedTuple):
    seconds: list[float]  # of each round
    memory: int | None


def measure(builders: dict, rounds: int, together=True, release=gc.collect) -> dict:
    """Runs each program once a round, in the opposite order of the round before.

    Args:
      builders: name -> function that makes a Program.
      together: hold all programs at once; otherwise one is timed and dropped before the next, which
        takes less memory but does not alternate.
      release: gives the memory of dropped programs back.

    Returns:
      name -> Timed, or the reason (a string) why a program does not run here.
    """
    results = {}
    for names in [list(builders)] if together else [[name] for name in builders]:
        programs, seconds = {}, {name: [] for name in names}
        for name in names:
            try:
                program = builders[name]()
                for _ in range(_WARM_UP):
                    program.run()
                programs[name] = program
            except Exception as error:  # out of memory, or a compiler that does not work here
                results[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
            program = None
            if name not in programs:
                release()
        for i in range(rounds):
            for name in list(programs)[:: -1 if i % 2 else 1]:
                start = time.perf_counter()
                programs[name].run()
                seconds[name].append(time.perf_counter() - start)
        results |= {name: Timed(seconds[name], programs[name].memory) for name in programs}
        programs.clear()
        release()
    return results
