"""One pass over an iteration's stored responses, against the same done on all of them in memory."""

from __future__ import annotations

import math
from array import array
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.rules import iteration_rules

from sppo_lightning.iteration.counters import ResponseCounters
from sppo_lightning.iteration.pairing_pass import PairingPass
from sppo_lightning.pairing import BestRandom, Choice, Pairing, Responses, pair_responses
from sppo_lightning.seeding import derive_seed
from sppo_lightning.store.shards import ShardStore
from sppo_lightning.types import EncodedPrompt, Prompt, Rollout

RULES = iteration_rules(samples_per_prompt=5, pairs_per_step=1, pairing=BestRandom(), seed=3)
IDS = [f"p{number}" for number in range(40)]
PROMPTS = {key: EncodedPrompt(Prompt(key, f"Q {key}", ()), (7, number)) for number, key in enumerate(IDS)}


def rollout(key: str, index: int) -> Rollout:
    """Rewards of few values, so that there are ties; some are no numbers, some responses were dropped."""
    draw = int(torch.randint(1000, (1,), generator=torch.Generator().manual_seed(derive_seed(key, index))))
    reward = math.nan if draw % 11 == 0 else float(draw % 3)
    reason = "unfinished" if draw % 13 == 0 else "non_finite_reward" if math.isnan(reward) else None
    parts = {"a": draw / 7, "b": math.nan if draw % 5 else 1.0}
    text = f"answer {draw % 50}"
    cut = "length" if draw % 2 else "stop"
    return Rollout(key, index, f"Q {key}", text, (draw % 50,) * (draw % 4 + 1), cut, reward, parts, reason)


class BestAgainstAll(Pairing):
    """The best response against each other one."""

    most_pairs = 4

    def pairs(self, responses: Responses, generator: torch.Generator) -> list[Choice]:
        best = int(responses.rewards.argmax())
        return [Choice(best, row) for row in range(len(responses)) if row != best]


@pytest.mark.parametrize(("pairing", "most"), [(BestRandom(), 20), (BestAgainstAll(), 80)])
def test_the_pass_finds_what_all_responses_in_memory_say(tmp_path: Path, pairing: Pairing, most: int) -> None:
    rules = replace(RULES, pairing=pairing)
    store, selected = ShardStore(tmp_path), set(IDS[::2])
    groups = {key: [rollout(key, index) for index in range(5 if key in selected else 2)] for key in IDS}
    for number in range(4):
        part = [groups[key] for key in IDS[number * 10 : (number + 1) * 10]]
        store.write("probe", number, [row for rows in part for row in rows[:2]])
        store.write("topup", number, [row for rows in part for row in rows[2:]])
    made = PairingPass(rules, PROMPTS, 1)
    pairs = made.pairs(store, IDS, selected)

    counters, dropped, expected = ResponseCounters(), Counter[str](), []
    choices = Counter[str]()
    for key, rows in groups.items():
        counters.add(rows)
        if key in selected:
            found, reason, dropped_choices = pair_responses(
                rows, PROMPTS[key], pairing, samples_per_prompt=5, iteration=1, seed=3
            )
            expected += found
            choices += dropped_choices
            dropped.update([reason] if reason is not None else [])
    assert repr(list(pairs)) == repr(expected)  # the reference's log-probs are NaN
    assert most / 4 < len(expected) < most
    assert made.dropped == dropped
    assert made.dropped_choices == choices
    assert choices
    assert len(made.rewards) + made.dropped.total() == len(selected)
    assert made.counters.counts() == counters.counts()
    assert made.counters.metrics() == counters.metrics()
    assert made.rewards == {
        pair.prompt_id: array("d", (row.reward for row in groups[pair.prompt_id] if row.usable))
        for pair in expected
    }
