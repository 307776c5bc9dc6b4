"""The difficulties that a study's runs estimated, and what they were estimated from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from sppo_lightning.paths import expand_path
from sppo_lightning.prompts.reading import read_prompts
from sppo_lightning.store.run_folder import RunFolder
from sppo_lightning.study.outcomes import Numbers, Outcome
from sppo_lightning.study.plan import PlannedRun
from sppo_lightning.types import UserError


@dataclass(frozen=True)
class Estimates:
    """Difficulties that one iteration of a run estimated; earlier ones that it carried on are not among them.

    Args:
        run: which one.
        iteration: from 0.
        difficulty: mean reward, by prompt id.
        samples: most rewards that one of them is the mean of.
    """

    run: PlannedRun
    iteration: int
    difficulty: Mapping[str, float]
    samples: int

    def rewards(self) -> dict[str, Numbers]:
        """Return the probe's rewards of each prompt, [samples], in the order of sampling; none where they are gone."""
        try:
            found = RunFolder(self.run.folder).iteration(self.iteration).shards.rewards("probe")
        except (UserError, OSError):
            return {}
        return {key: np.asarray(values, dtype=np.float64) for key, values in found.items()}

    def texts(self) -> dict[str, str]:
        """Return what the user says in each prompt; none where the responses are gone."""
        try:
            return RunFolder(self.run.folder).iteration(self.iteration).shards.prompt_texts()
        except (UserError, OSError):
            return {}


def estimates(run: PlannedRun, iterations: int) -> list[Estimates]:
    """Return what each iteration of a run estimated; nothing of one without estimates, or with a damaged table.

    Args:
        run: that has ended.
        iterations: that it took.
    """
    found = []
    for iteration in range(iterations):
        try:
            table, _ = RunFolder(run.folder).iteration(iteration).read_difficulty()
        except (UserError, OSError):
            continue
        new = (table["estimated_iteration"] == iteration).tolist()
        columns = (table["mean_reward"].tolist(), table["samples"].tolist())
        rows = [
            row for row, keep in zip(zip(table.prompt_ids, *columns, strict=True), new, strict=True) if keep
        ]
        if rows:
            samples = max(int(count) for _, _, count in rows)
            found.append(Estimates(run, iteration, {key: mean for key, mean, _ in rows}, samples))
    return found


def initial_estimates(outcomes: Sequence[Outcome]) -> dict[tuple[str, int], Estimates]:
    """Return what iteration 0 estimated, by setting and seed: of the arm that took most answers, or the first of such.

    Arms of a seed start from one policy, and those that take equally many answers share them.

    Args:
        outcomes: of the runs that have ended.
    """
    found: dict[tuple[str, int], Estimates] = {}
    for item in outcomes:
        for each in estimates(item.run, 1):
            key = (item.run.setting, item.run.seed)
            if key not in found or each.samples > found[key].samples:
                found[key] = each
    return found


def categories(run: PlannedRun, field: str) -> dict[str, str]:
    """Return the category of each training prompt that has one, by id; none where the prompts are not files here.

    Args:
        run: whose config names the prompts.
        field: of a prompt, that holds its category.
    """
    data = run.config.get("data", {})
    sources = data.get("prompts")
    columns = data.get("columns")
    try:
        paths = [
            expand_path(each, key="data.prompts")
            for each in ([sources] if isinstance(sources, str) else sources or [])
        ]
        if not paths or not all(Path(path).exists() for path in paths):
            return {}
        return _categories(tuple(paths), tuple(sorted((columns or {}).items())), field)
    except UserError:
        return {}


@cache
def _categories(paths: tuple[str, ...], columns: tuple[tuple[str, Any], ...], field: str) -> dict[str, str]:
    """Read them once, however often a study writes its page."""
    prompts = read_prompts(list(paths), key="data.prompts", columns=dict(columns))
    return {
        prompt.id: str(prompt.metadata[field]) for prompt in prompts if prompt.metadata.get(field) is not None
    }
