"""Training on Google Kubernetes Engine, as JobSets: python -m launch.gke, docs/how-to/gke.md."""

from launch.gke.jobset import submit

__all__ = ["submit"]
