"""Replay: any step of any run, rebuilt on one CPU.

rebuild.py  the state before the step, and the step done again
step.py     what a step did: samples, gradients, the first number that is not finite
show.py     its lines of text, and its picture
"""

from __future__ import annotations

from dist_train.tools.replay.rebuild import Look, replay
from dist_train.tools.replay.show import picture, table
from dist_train.tools.replay.step import Layer, Replayed, Seen

__all__ = ["Layer", "Look", "Replayed", "Seen", "picture", "replay", "table"]
