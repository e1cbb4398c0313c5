"""Training: the step, optimizers, spikes, fine-tuning, metrics and the observation of runs."""
