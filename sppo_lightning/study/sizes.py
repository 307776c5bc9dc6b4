"""Whether each arm has pairs enough for one optimizer step, counted before anything runs."""

from __future__ import annotations

import json
from argparse import ArgumentError
from collections.abc import Sequence

from jsonargparse import ArgumentParser

from sppo_lightning.iteration.rule_checks import check_sizes, set_up_rules
from sppo_lightning.iteration.rules import IterationRules
from sppo_lightning.prompts.reading import read_prompts
from sppo_lightning.prompts.table import PromptTable
from sppo_lightning.study.plan import PlannedRun
from sppo_lightning.types import UserError

DEFAULTS = {
    "schedule": {"class_path": "sppo_lightning.selection.AllPrompts"},
    "pairing": {"class_path": "sppo_lightning.pairing.BestWorst"},
    "pair_selection": {"class_path": "sppo_lightning.selection.AllPairs"},
}
"""Rules of a config that names none."""


def check_pairs(runs: Sequence[PlannedRun]) -> None:
    """Refuse arms whose rules leave some iteration fewer prompts than the pairs of one optimizer step.

    Ties and prompts that are too long only show in a run, and take more away.

    Args:
        runs: of the study.

    Raises:
        UserError: naming the arm, the iteration and the sizes; or if prompts cannot be read.
    """
    read: dict[str, PromptTable] = {}
    for run in {(run.setting, run.arm): run for run in runs}.values():
        rules, data = _rules(run), run.config["data"]
        prompts, columns = data.get("prompts"), data.get("columns") or {}
        if rules is None or not isinstance(prompts, str | list):
            continue
        source = json.dumps([prompts, columns], default=str)
        try:
            if source not in read:
                read[source] = read_prompts(prompts, key="data.prompts", columns=columns)
            set_up_rules(rules, read[source])
            check_sizes(rules, read[source].ids)
        except UserError as error:
            raise UserError(f"arm {run.arm} in setting {run.setting}: {error}") from error


def _rules(run: PlannedRun) -> IterationRules | None:
    """Return a run's rules; ``None``: they cannot be made, and the run itself will say why."""
    data = {name: value for name, value in run.config["data"].items() if value is not None}
    given = {**DEFAULTS, "probe_samples": data.get("samples_per_prompt"), **data, "seed": run.seed}
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(IterationRules, "rules")
    names = set(IterationRules.__dataclass_fields__) - {"fresh_states"}
    try:
        parsed = parser.parse_object({"rules": {name: given[name] for name in names & set(given)}})
        found: IterationRules = parser.instantiate(parsed).rules
    except (ArgumentError, ValueError, TypeError, ImportError):
        return None
    return found
