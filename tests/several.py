"""Starts several real processes of one program on this machine, which find each other."""

import os
import socket
import subprocess
import sys

import xla_flags
from paths import ROOT


def start(count: int, devices: int, *arguments: str, own=()) -> list[subprocess.Popen]:
    """`python ARGUMENTS` as `count` processes of so many CPU devices each; one stays alone.

    Args:
      own: further arguments of each process, which the others do not get.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environment = os.environ | {
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
        "JAX_PLATFORMS": "cpu",
        # XLA's threads for all CPU devices: of as few as there are cores, all can wait at different
        # collectives of one device, for another device that gets no thread.
        "NPROC": "16",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} {xla_flags.QUICK}",
    }
    if count > 1:
        environment |= {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(count)}
    return [
        subprocess.Popen(
            [sys.executable, *arguments, *(own[i] if own else ())],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment | ({"JAX_PROCESS_ID": str(i)} if count > 1 else {}),
        )
        for i in range(count)
    ]


def finish(running: list[subprocess.Popen], timeout: float = 240) -> list[tuple[int, str, str]]:
    """(code, standard output, standard error) of each process."""
    try:
        written = [process.communicate(timeout=timeout) for process in running]
    finally:
        for process in running:
            process.kill()
    return [(process.returncode, *texts) for process, texts in zip(running, written, strict=True)]
