"""Checks of an iteration's rules against the prompts, before anything is sampled."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sppo_lightning.difficulty import StatisticsTable
from sppo_lightning.iteration.rules import IterationRules
from sppo_lightning.prompts.table import PromptTable
from sppo_lightning.types import UserError


def check_sizes(rules: IterationRules, prompt_ids: Sequence[str]) -> None:
    """Refuse rules that leave an iteration too few prompts for the pairs that one optimizer step needs.

    Raises:
        UserError: naming the iteration and the sizes.
    """
    for iteration in range(rules.iterations):
        total, size = rules.expected_pairs(prompt_ids, iteration, each=rules.most_pairs)
        if size < rules.pairs_per_step:
            kept = f"{size} pairs" if rules.most_pairs > 1 else size
            raise UserError(
                f"data.selection keeps {kept} of {total} candidate prompts in iteration {iteration}, fewer than one "
                f"optimizer step of data.pairs_per_step={rules.pairs_per_step}: raise the fraction, add prompts or "
                "lower pairs_per_step"
            )


def set_up_rules(rules: IterationRules, prompts: PromptTable) -> None:
    """Show the rules the training prompts, once it is sure that each has what they read.

    Raises:
        UserError: naming the rule, the key and the first prompt without it.
    """
    for slot, rule in rules.keeping.items():
        for name in rule.prompt_fields:
            lacking = next((one.id for one in prompts if one.metadata.get(name) is None), None)
            if lacking is not None:
                raise UserError(
                    f"data.{slot}: {type(rule).__name__} reads {name!r} of each prompt, but prompt {lacking!r} in "
                    f"data.prompts has none: add {name!r} to the file, name another key, or use another rule"
                )

    def metadata(name: str) -> tuple[Any, ...]:
        return tuple(one.metadata[name] for one in prompts)

    rules.setup(StatisticsTable(tuple(prompts.ids), {}, read_metadata=metadata))
