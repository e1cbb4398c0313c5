"""Training on Cloud TPU VMs by queued resources: `python -m launch.tpu_vm --help`."""
