"""Which policy is the best so far by its held-out reward, and whether the last iteration is a step back."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from sppo_lightning.evaluation.measures import paired_difference
from sppo_lightning.evaluation.stored import load_evaluation
from sppo_lightning.store.run_folder import RunFolder
from sppo_lightning.system.durable import read_checksummed, with_checksum, write_atomically
from sppo_lightning.types import Rollout, UserError, first_line

MORE_FAILED = 0.05  # of the held-out answers, which a policy may fail in addition


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
        fingerprint: of the policy.
    """

    finished: int
    action: str
    reasons: tuple[str, ...]
    best: int
    difference: float
    stderr: float
    learning_rate_factor: float
    fingerprint: str

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
    """Return what was decided so far, in order; empty where no gate watched.

    Raises:
        UserError: if the file is damaged: nothing else knows at which rate the run goes on.
    """
    if not folder.gate.exists():
        return []
    try:
        found = read_checksummed(folder.gate.read_bytes())["decisions"]
        return [Decision.from_state(item) for item in found]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder.gate} is damaged ({first_line(error)}): restore it from a copy, or start anew in another "
            "trainer.default_root_dir"
        ) from error


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
        bounds: largest values of diagnostics; NaN is over any, and one that was not measured passes.
    """
    difference = paired_difference(rows, best)
    reasons = []
    allowed = 0.0 if math.isnan(difference.stderr) else tolerance * difference.stderr
    if difference.mean < -allowed:
        reasons.append(
            f"its held-out reward is {-difference.mean:.3f} ± {difference.stderr:.3f} below the best so far"
        )
    failed, before = (failed_share(each) for each in (rows, best))
    if failed > before + MORE_FAILED:
        reasons.append(
            f"{failed:.1%} of its held-out answers have no reward, of the best so far {before:.1%}"
        )
    for name, bound in bounds.items():
        if name in diagnostics and not (value := diagnostics[name]) <= bound:
            reasons.append(f"{name} is {value:.3g}, over {bound:g}")
    return reasons, difference.mean, difference.stderr


def failed_share(rows: Sequence[Rollout]) -> float:
    """Return the share of answers without a finite reward."""
    return sum(row.reward is None or not math.isfinite(row.reward) for row in rows) / max(len(rows), 1)


def best_finished(folder: RunFolder, iterations: int) -> int | None:
    """Return the iterations after which the policy was best; ``None`` if the initial one was not evaluated.

    As the run's gate has decided. Without one, each policy is compared with the best before it, prompt by prompt.

    Args:
        folder: the run.
        iterations: the last one that counts.
    """
    decided = [item for item in read_decisions(folder) if item.finished <= iterations]
    if decided:
        return decided[-1].best
    best, found = load_evaluation(folder.evaluation("000")), 0
    if best is None:
        return None
    for finished in range(1, iterations + 1):
        rows = load_evaluation(folder.evaluation(f"{finished:03d}"))
        if rows is not None and paired_difference(rows, best).mean > 0:
            best, found = rows, finished
    return found
