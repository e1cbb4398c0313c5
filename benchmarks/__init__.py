"""Benchmarks, run from the root: python -m benchmarks.NAME."""

# A package, and no mere folder, since pySBD installs a package of the same name.
