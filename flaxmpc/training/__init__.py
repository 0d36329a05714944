"""The training loop of any model: its losses, metrics, checkpoints and log, on all devices of one or more hosts."""
