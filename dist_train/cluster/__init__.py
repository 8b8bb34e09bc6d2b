"""What starts processes: SLURM, torchrun, Accelerate."""
