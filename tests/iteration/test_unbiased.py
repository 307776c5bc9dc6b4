"""What is learnt of difficulty does not depend on who was selected."""

from __future__ import annotations

from pathlib import Path

import torch

from sppo_lightning.difficulty import empty_difficulty_table
from sppo_lightning.iteration.builder import difficulty_after
from sppo_lightning.iteration.counters import ResponseCounters
from sppo_lightning.selection import Easiest
from sppo_lightning.store.shards import ShardStore, by_prompt, merged
from sppo_lightning.types import Rollout

PROMPTS = [f"p{number}" for number in range(2000)]


def rollout(prompt_id: str, index: int, reward: float) -> Rollout:
    return Rollout(prompt_id, index, "", "", (5, 1), "stop", reward, {"part": reward})


def test_identical_prompts_stay_identical_on_average(tmp_path: Path) -> None:
    """Rewards of all prompts have mean 0 and deviation 1; the easiest half by a probe of two gets four more each.

    Those were lucky in the probe, so that more samples lower their means: over all samples the mean would be 0.16 sd
    too low, and so would be the difficulties that the next iteration starts from. Standard errors here are 0.02.
    """
    generator = torch.Generator().manual_seed(0)
    rewards = torch.randn(len(PROMPTS), 6, generator=generator, dtype=torch.float64)
    store = ShardStore(tmp_path)
    probe = {key: range(2) for key in PROMPTS}
    store.write(
        "probe",
        0,
        [rollout(key, n, float(rewards[row, n])) for row, key in enumerate(PROMPTS) for n in (0, 1)],
    )
    table = difficulty_after(
        store.rewards("probe"), empty_difficulty_table(), iteration=0, smoothing=0.0, at_random=False
    )
    keep = Easiest(0.5).select(table, iteration=0, seed=0).tolist()
    selected = [row for row, kept in enumerate(keep) if kept]
    topup = [rollout(PROMPTS[row], n, float(rewards[row, n])) for row in selected for n in range(2, 6)]
    store.write("topup", 0, topup)

    counters = ResponseCounters()
    sources = (by_prompt(store.stream(name)) for name in ("probe", "topup"))
    for prompt_id, rows in merged(PROMPTS, *sources):
        counters.add(rows, probed=probe[prompt_id])
    metrics = counters.metrics()
    assert abs(metrics["iteration/reward/mean"]) < 0.05
    assert metrics["iteration/reward/parts/part"] == metrics["iteration/reward/mean"]

    probed, others = store.difficulty_rewards()
    assert others == {}
    carried = difficulty_after(probed, empty_difficulty_table(), iteration=0, smoothing=0.0, at_random=False)
    assert abs(float(carried["difficulty"].mean())) < 0.05
    everything = store.rewards()
    naive = sum(sum(values) / len(values) for values in everything.values()) / len(everything)
    assert naive < -0.1
