"""Training: the step, optimizers, spikes, fine-tuning, metrics and what is observed of a run."""
