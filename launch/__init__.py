"""Launching training: sweeps, SLURM, TPU VMs, GKE, SkyPilot. Run from the repository's root."""
