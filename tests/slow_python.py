"""BIPE_PYTHON of tests/launch/test_slurm.py: `python -m MODULE ...`, with a first start that takes its time.

Each step of training sleeps for SLEEP seconds until SLURM has restarted the job, so that a test can
disturb it on a machine of any speed.
"""

import os
import runpy
import sys
import time

assert sys.argv[1] == "-m"
sys.path[0] = os.getcwd()  # as -m has it
module = sys.argv[2]
if module == "bipe_jax.train" and "SLURM_RESTART_COUNT" not in os.environ:
    from bipe_jax import processes

    def preempted(step, ask=processes.preempted):
        time.sleep(float(os.environ["SLEEP"]))
        return ask(step)

    processes.preempted = preempted
sys.argv = ["", *sys.argv[3:]]
runpy.run_module(module, run_name="__main__", alter_sys=True)
