"""Which policy is the best so far by its held-out reward, and whether the last iteration is a step back."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from sppo_lightning.evaluation.held_out import paired_difference
from sppo_lightning.evaluation.results import HeldOutResult
from sppo_lightning.store.run_folder import RunFolder
from sppo_lightning.system.durable import read_checksummed, with_checksum, write_atomically
from sppo_lightning.types import Rollout


@dataclass(frozen=True)
class Decision:
    """What was decided about the policy at an iteration's end.

    Args:
        finished: self-play iterations that it was trained for.
        action: ``accept``, ``warn``, ``stop`` or ``revert``.
        reasons: why it was not accepted, for people.
        best: finished iterations of the best policy accepted so far, this one included; 0: the initial policy.
        difference: mean held-out reward less that of the best before, prompt by prompt; NaN: not known.
        stderr: of that difference.
        learning_rate_factor: of all iterations from here on.
    """

    finished: int
    action: str
    reasons: tuple[str, ...]
    best: int
    difference: float
    stderr: float
    learning_rate_factor: float

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Decision:
        """Return what :meth:`state` came from."""
        names = [field.name for field in fields(cls)]
        return cls(**{**{name: state[name] for name in names}, "reasons": tuple(state["reasons"])})

    def state(self) -> dict[str, Any]:
        """Return plain containers."""
        return {**asdict(self), "reasons": list(self.reasons)}

    @property
    def policy(self) -> int:
        """Finished iterations of the policy that the run has from here on."""
        return self.best if self.action == "revert" else self.finished


def read_decisions(folder: RunFolder) -> list[Decision]:
    """Return what was decided so far, in order; empty where no gate watched."""
    try:
        found = read_checksummed(folder.gate.read_bytes())["decisions"]
        return [Decision.from_state(item) for item in found]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def write_decisions(folder: RunFolder, decisions: Sequence[Decision]) -> None:
    """Store what was decided."""
    write_atomically(folder.gate, with_checksum({"decisions": [item.state() for item in decisions]}))


def steps_back(
    rows: Sequence[Rollout],
    best: Sequence[Rollout],
    diagnostics: Mapping[str, float],
    *,
    tolerance: float,
    bounds: Mapping[str, float],
) -> tuple[list[str], float, float]:
    """Return why a policy is a step back, if it is one, and its paired difference to the best with standard error.

    Args:
        rows: its held-out answers.
        best: those of the best policy before.
        diagnostics: what was measured, by metric name.
        tolerance: standard errors of the difference that the reward may fall.
        bounds: largest values of diagnostics; one that was not measured passes.
    """
    difference = paired_difference(rows, best)
    reasons = []
    allowed = 0.0 if math.isnan(difference.stderr) else tolerance * difference.stderr
    if difference.mean < -allowed:
        reasons.append(
            f"its held-out reward is {-difference.mean:.3f} ± {difference.stderr:.3f} below the best so far"
        )
    for name, bound in bounds.items():
        value = diagnostics.get(name, math.nan)
        if value > bound:
            reasons.append(f"{name} is {value:.3g}, over {bound:g}")
    return reasons, difference.mean, difference.stderr


def best_result(results: Sequence[HeldOutResult], decisions: Sequence[Decision]) -> HeldOutResult | None:
    """Return the evaluation with the highest mean reward, the earliest of equals, of policies that were not refused.

    Args:
        results: of a run.
        decisions: of its gate, if it had one.
    """
    refused = {item.finished for item in decisions if item.action != "accept"}
    accepted = [item for item in results if item.finished not in refused and not math.isnan(item.reward)]
    return max(accepted, key=lambda item: (item.reward, -item.finished), default=None)
