"""The account of a run's time: what was productive, what was waiting, saving, or lost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dist_train.config import counted
from dist_train.record.terminal import clock

SECONDS = ("productive", "saving", "waiting for data", "starting", "lost")


@dataclass
class Account:
    """Where a run's time went, over all its attempts."""

    before: float  # seconds of the attempts before this one
    lost_steps: int  # steps that were done again, since no checkpoint held them
    seconds: dict[str, float]

    @classmethod
    def after(cls, status: dict[str, Any], resumed: int) -> Account:
        """The account of an attempt that goes on from step `resumed`, after one that left `status`."""
        old = status.get("seconds", {})
        account = cls(
            before=max(0.0, float(old.get("total", 0.0))),
            lost_steps=int(status.get("lost_steps", 0)),
            seconds={name: max(0.0, float(old.get(name, 0.0))) for name in SECONDS},
        )
        done = int(status.get("step", 0))
        if done > resumed:  # what they cost is known on average only
            share = (done - resumed) / (done + account.lost_steps)
            moved = account.seconds["productive"] * share
            account.seconds["productive"] -= moved
            account.seconds["lost"] += moved
            account.lost_steps += done - resumed
        return account

    def goodput(self, total: float) -> float:
        """The share of `total` seconds that was productive."""
        return self.seconds["productive"] / max(total, 1e-9)

    def in_words(self, total: float, attempts: int) -> str:
        """The account as a line of text."""
        parts = ", ".join(f"{name} {clock(value)}" for name, value in self.seconds.items() if value >= 0.5)
        lost = f", {counted(self.lost_steps, 'step')} done again" if self.lost_steps else ""
        share = f"{self.goodput(total):.0%} of {clock(total)}"
        return f"goodput {share} in {counted(attempts, 'attempt')}{lost} ({parts or 'all under 1s'})"
