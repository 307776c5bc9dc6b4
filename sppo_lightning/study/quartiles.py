"""Held-out prompts by quartile of difficulty: where on the scale an arm ends higher than another.

Difficulty is the initial policy's own held-out reward, and so an arm's gain over the initial policy is no fair reading
of a quartile: the hardest prompts are in part those that the initial policy was unlucky with, and can only rise
(regression to the mean). It biases all arms alike, so that arms can be compared with each other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sppo_lightning.study.definition import Study
from sppo_lightning.study.outcomes import Numbers, Outcome, mean_of_known
from sppo_lightning.study.statistics import Comparison, compare, interval_text
from sppo_lightning.text import for_markdown

QUARTILES = 4


@dataclass(frozen=True)
class Quartile:
    """An arm on a quartile of the held-out prompts.

    Args:
        setting: where.
        arm: which one.
        number: from 1, the hardest.
        initial: mean held-out reward of the initial policy.
        final: of the arm's final policy, mean over the seeds.
        gain: over the initial policy; biased by regression to the mean.
        difference: of the final reward to that of the study's first arm, paired by seed and prompt; ``None``: it is the
            first arm, or no seed of both has ended.
    """

    setting: str
    arm: str
    number: int
    initial: float
    final: float
    gain: Comparison
    difference: Comparison | None


def quartiles(study: Study, outcomes: Sequence[Outcome]) -> list[Quartile]:
    """Return each arm on each quartile of each setting's held-out prompts, hardest first.

    Args:
        study: whose first arm the others are compared with.
        outcomes: of the runs that have ended; those of a setting were measured on the same prompts.
    """
    reference = next(iter(study.arms))
    found = []
    for setting in study.settings:
        here = [item for item in outcomes if item.run.setting == setting]
        by_run = {(item.run.arm, item.run.seed): item for item in here}
        parts = by_difficulty(here) if here else []
        for arm in study.arms:
            ours = [item for item in here if item.run.arm == arm]
            others = {item.run.seed: by_run.get((reference, item.run.seed)) for item in ours}
            pairs = [(item, other) for item in ours if (other := others[item.run.seed]) is not None]
            for number, part in enumerate(parts, start=1):
                if not ours or not part.size:
                    continue
                differences = [item.final.rewards[part] - other.final.rewards[part] for item, other in pairs]
                found.append(
                    Quartile(
                        setting,
                        arm,
                        number,
                        mean_of_known(ours[0].evaluations[0].rewards[part]),
                        float(np.mean([mean_of_known(item.final.rewards[part]) for item in ours])),
                        compare(np.stack([item.gain[part] for item in ours])),
                        compare(np.stack(differences)) if differences and arm != reference else None,
                    )
                )
    return found


def by_difficulty(outcomes: Sequence[Outcome]) -> list[NDArray[np.intp]]:
    """Return the places of the held-out prompts of each quartile, hardest first.

    By rank of the initial policy's reward, mean over the runs; equal ones by prompt id, so that the quartiles have the
    same size. Prompts without a reward are in none.

    Args:
        outcomes: at least one, measured on the same prompts.
    """
    rewards: Numbers = np.mean([item.evaluations[0].rewards for item in outcomes], axis=0)
    places = [place for place, reward in enumerate(rewards) if np.isfinite(reward)]
    ids = outcomes[0].prompt_ids
    order = sorted(places, key=lambda place: (rewards[place], ids[place]))
    return np.array_split(np.array(order, dtype=np.intp), QUARTILES)


def flat(row: Quartile) -> dict[str, object]:
    """Return a row of ``quartiles.parquet``."""
    return {
        **{"setting": row.setting, "arm": row.arm, "quartile": row.number, "prompts": row.gain.prompts},
        **{"seeds": row.gain.seeds, "initial": row.initial, "final": row.final},
        **{"gain": row.gain.mean, "gain_low": row.gain.low, "gain_high": row.gain.high},
        **_named("difference", row.difference),
    }


def _named(name: str, found: Comparison | None) -> dict[str, float | None]:
    ends = (None, None, None) if found is None else (found.mean, found.low, found.high)
    return dict(zip((name, f"{name}_low", f"{name}_high"), ends, strict=True))


def quartile_section(study: Study, rows: Sequence[Quartile]) -> Iterator[str]:
    """Yield the page's lines; none of a setting where nothing can be compared with the first arm yet."""
    compared = {row.setting for row in rows if row.difference is not None}
    if not compared:
        return
    first = for_markdown(study.title(next(iter(study.arms))))
    yield "## Held-out prompts by difficulty\n"
    yield (
        f"Held-out reward at the end less that of {first}, the study's first arm, on each quartile of the held-out "
        "prompts by the initial policy's reward. Of prompts with equal rewards the one whose id comes first counts as "
        "harder, so that quartiles with the same mean differ by ids alone. Arms are compared with each other, as the "
        "gain over the initial policy would mislead: prompts that it happened to do badly on rise whatever is trained "
        "(regression to the mean). Intervals are not corrected for their number. `quartiles.parquet` has the gains "
        "too.\n"
    )
    for setting in study.settings:
        if setting not in compared:
            continue
        here = [row for row in rows if row.setting == setting]
        numbers = sorted({row.number for row in here})
        initial = {row.number: row.initial for row in here}
        names = {1: " (hardest)", QUARTILES: " (easiest)"}
        heads = [
            f"quartile {number}{names.get(number, '')}, initially {initial[number]:.3f}" for number in numbers
        ]
        yield f"| {' | '.join((for_markdown(setting), *heads))} |"
        yield "|---" * (1 + len(heads)) + "|"
        for arm in study.arms:
            cells: Mapping[int, str] = {row.number: _cell(row) for row in here if row.arm == arm}
            if cells:
                title = for_markdown(study.title(arm))
                yield f"| {' | '.join((title, *(cells.get(number, '') for number in numbers)))} |"
        yield ""


def _cell(row: Quartile) -> str:
    """Return the difference to the first arm; of that one the reward itself."""
    if row.difference is None:
        return f"{row.final:.3f} at the end"
    return f"{row.difference.mean:+.3f}{interval_text(row.difference.low, row.difference.high)}"
