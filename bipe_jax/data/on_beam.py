"""The jobs of a preparation on a cluster, by Apache Beam: each element is the number of a job.

All machines need access to the output, and the package installed.
"""

from collections.abc import Sequence
from typing import Any

from bipe_jax.data import jobs
from bipe_jax.errors import UserError


def options(runner: str, arguments: Sequence[str]) -> Any:
    """Apache Beam's PipelineOptions.

    Raises:
      UserError: Beam is not installed, or the options choose multi-threading, which corrupts data.
    """
    try:
        from apache_beam.options.pipeline_options import DirectOptions, PipelineOptions
    except ImportError:
        raise UserError("--runner needs Apache Beam: pip install -e '.[beam]'") from None
    parsed = PipelineOptions([f"--runner={runner}", *arguments])
    if parsed.view_as(DirectOptions).direct_running_mode == "multi_threading":
        raise UserError(
            "--direct_running_mode=multi_threading may corrupt data: use multi_processing"
        )
    return parsed


def run_all(plan: jobs.Plan, numbers: list[int], runner: str, options: Any) -> None:
    """Runs jobs on a cluster, and waits for them.

    Raises:
      UserError: as `jobs.run`; or there is no such runner.
    """
    import apache_beam as beam

    # Beam's default local runner would download a program.
    if runner.lower() in ("direct", "directrunner"):
        runner = "FnApiRunner"
    try:
        with beam.Pipeline(runner=runner, options=options) as pipeline:
            _ = pipeline | beam.Create(numbers) | beam.Reshuffle() | beam.Map(_run, plan=plan)
    except (ValueError, ImportError) as error:
        raise UserError(f"--runner={runner}: {' '.join(str(error).split())}") from None
    failed = [plan.file(i, "error") for i in numbers if plan.file(i, "error").exists()]
    if failed:
        reason = failed[0].read_text()
        for path in failed:
            path.unlink()
        raise UserError(reason)


def _run(number: int, plan: jobs.Plan) -> int:
    """Runs a job. A UserError is written to a file, since runners would retry the job."""
    try:
        jobs.run(plan, number)
    except UserError as error:
        plan.path("parts").mkdir(parents=True, exist_ok=True)
        plan.file(number, "error").write_text(str(error))
    return number
