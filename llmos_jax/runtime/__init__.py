"""What keeps a job alive: checkpoints, processes, metrics, faults, the model store."""
