"""Reading runs from Python, under the name that this had first: see record/history.py."""

from dist_train.record.history import read_attempts, read_lines, read_metrics, read_status

__all__ = ["read_attempts", "read_lines", "read_metrics", "read_status"]
