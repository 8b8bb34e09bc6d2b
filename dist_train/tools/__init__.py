"""What is done to runs besides training: looking at them, rebuilding steps, putting a job to the test."""
