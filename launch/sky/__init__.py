"""Training as managed jobs of SkyPilot: python -m launch.sky, docs/how-to/sky.md."""

from launch.sky.managed import submit

__all__ = ["submit"]
