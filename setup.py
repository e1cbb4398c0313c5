"""The packages of a wheel: bipe_jax, and in it the shipped configs. Everything else is in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["bipe_jax", "bipe_jax.*"]), "bipe_jax.configs"],
    package_dir={"bipe_jax.configs": "configs"},
)
