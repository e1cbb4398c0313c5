"""The tests of numerics/, in a process whose XLA optimises as it does for users."""

import os
import subprocess
import sys

import pytest
from paths import ROOT


@pytest.mark.slow
def test_the_program_that_users_run_passes_the_tests_of_numerics():
    environment = os.environ | {"BIPE_AS_USERS": "1"}
    environment.pop("XLA_FLAGS", None)
    line = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "tests/numerics"]
    done = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:  # what that process says is the failure
        pytest.fail(
            f"BIPE_AS_USERS=1 {' '.join(line[1:])}\n{done.stdout}{done.stderr}", pytrace=False
        )
