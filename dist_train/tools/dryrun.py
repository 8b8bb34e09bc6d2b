"""A training of some steps that leaves nothing behind, for the tools that measure a job."""

from __future__ import annotations

from collections.abc import Iterator

from dist_train import data, tasks
from dist_train.config import Config
from dist_train.distill import taught
from dist_train.learner import Learner, Step
from dist_train.models import pretrained, weights
from dist_train.optim import rates
from dist_train.runtime import Runtime


class DryRun:
    """A training as it would begin, built as `fit` builds it, step by step; all ranks must make it.

    Args:
        sets: the data, where it is at hand.

    Raises UserError if the job can't be trained.
    """

    def __init__(self, config: Config, ranks: Runtime, sets: data.Data | None = None) -> None:
        config = pretrained.with_own_transforms(config)
        with ranks.together():
            with ranks.main_of_node_first():
                self.sets = sets or data.build(config)
            self.task, _ = taught(config, tasks.build(config), ranks, self.sets)
            self.total = self.sets.total_steps(config)
            self.schedule = rates.schedule(config, self.total, self.sets.steps_per_epoch(config))
            first = weights.first(config) if ranks.is_main else None
        self.learner = Learner(config, ranks, self.sets, self.task, weights=first)
        feed = self.sets.train_feed(config, ranks, 0, 2**31, self.learner.parts)
        self.fetch = feed.__next__
        self.samples = 0  # of all steps, over all ranks

    def step(self, share: float) -> Step:
        """Takes one step, with this share of each learning rate."""
        return self.learner.train_step(self._parts(), share)

    def train(self, steps: int) -> None:
        """Takes some steps; beyond the end of the run with the last learning rate."""
        for _ in range(steps):
            self.step(self.schedule(min(self.learner.step, self.total - 1), {}))

    def _parts(self) -> Iterator[data.Batch]:
        """This rank's parts of the next step."""
        for _ in range(self.learner.per_rank):
            batch = self.fetch()
            yield batch
        self.samples += batch.part.total
