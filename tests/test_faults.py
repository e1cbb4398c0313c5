"""Real trainings under faults, and what each mend of the survival code is there for."""

from jax.experimental import multihost_utils

from bipe_jax.train import train


def test_sigterm_is_asked_for_once_a_step_also_in_a_run_that_goes_on(config, tmp_path, monkeypatch):
    """JAX heeds it at the highest number that it was asked with: other askers delay the stop."""
    assert not train(config, str(tmp_path), stop_at=6)
    asked = []

    def record(step):
        asked.append(step)
        return False

    monkeypatch.setattr(multihost_utils, "reached_preemption_sync_point", record)
    assert train(config, str(tmp_path))
    assert asked == [1, 2, 3, 4, 5, 6]
