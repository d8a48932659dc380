"""A task without a model: scores are drawn by unit, seed and policy, kept fractions are known."""

import os
import time
import zlib
from dataclasses import dataclass

from namm_transfer.errors import ConfigError
from namm_transfer.eval.results import UNDECODABLE
from namm_transfer.eval.task import Outcome, Unit


@dataclass(frozen=True)
class FakeTask:
    """`clips` clusters of `questions` units; NAMM keeps 0.2 of unit 0, 0.3 of unit 1, 0.2 of unit 2, ...

    The units of the clips `undecided` are too short for a decision.
    """

    name: str = "fake"
    clips: int = 3
    questions: int = 2
    undecodable: str = ""
    undecided: tuple[str, ...] = ()
    baselines: tuple[str, ...] = ("window",)
    metric: str = "accuracy"
    weights: str = "abc"
    pause: float = 0.0
    interrupt_after: int = -1
    model: object = None
    videos: str = ""
    frames: int = 64

    def __post_init__(self):
        if self.clips < 1:
            raise ConfigError(f"clips is {self.clips}; expected at least 1")

    def units(self, seed):
        return [Unit(f"clip{c}/{q}", f"clip{c}") for c in range(self.clips) for q in range(self.questions)]

    def inputs(self):
        return {"weights": self.weights}

    def evaluate(self, units, policy, seed):
        if log := os.environ.get("FAKE_TASK_LOG"):
            with open(log, "a") as file:
                file.write(f"{policy if isinstance(policy, str) else policy.describe()} {len(units)}\n")
        for number, unit in enumerate(units):
            time.sleep(self.pause)
            if number == self.interrupt_after:
                raise KeyboardInterrupt
            if unit.cluster == self.undecodable:
                yield Outcome(unit, status=UNDECODABLE, error=f"{unit.cluster}.mp4: no readable video stream")
                continue
            name = policy if isinstance(policy, str) else policy.name
            drawn = getattr(getattr(policy, "namm", None), "fingerprint", str)() + name
            known = {"full": 1.0, "namm": 0.2 + 0.1 * (int(unit.id[-1]) % 2)}
            fraction = None if isinstance(policy, str) else known.get(name, policy.budget)
            draw = zlib.crc32(f"{unit.id} {seed} {drawn}".encode()) % 1000 / 1000
            yield Outcome(
                unit,
                score=float(draw < (0.9 if name == "full" else 0.6)),
                kept_fraction=fraction,
                kept_at_updates=None if unit.cluster in self.undecided and name != "full" else fraction,
                tokens_seen=100,
                bytes_kv=1000,
                bytes_total=1100,
                detail={"reply": "B"},
            )


@dataclass(frozen=True)
class DyingTask(FakeTask):
    """Its process dies, once, in the midst of a job."""

    marker: str = ""

    def evaluate(self, units, policy, seed):
        for number, outcome in enumerate(super().evaluate(units, policy, seed)):
            if number == 1 and not os.path.exists(self.marker):
                with open(self.marker, "w"):
                    os.kill(os.getpid(), 9)
            yield outcome
