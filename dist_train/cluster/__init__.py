"""What starts processes: SLURM, torchrun, Accelerate; and jobs and sweeps for SLURM."""
