"""Counts an iteration's responses as they stream by: in = out + dropped."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

from sppo_lightning.iteration.diversity import Diversity
from sppo_lightning.types import ScoredRollout


class ResponseCounters:
    """Running counts and sums of an iteration's responses."""

    def __init__(self) -> None:
        self._sampled = 0
        self._dropped: Counter[str] = Counter()
        self._answered = 0
        self._tokens = 0
        self._cut = 0
        self._usable = 0
        self._scored_prompts = 0
        self._prompt_means = 0.0
        self._part_means: defaultdict[str, float] = defaultdict(float)
        self._part_prompts: Counter[str] = Counter()
        self._diversity = Diversity()

    def add(self, rows: Sequence[ScoredRollout], *, probed: range | None = None) -> None:
        """Count all responses to one prompt.

        Args:
            rows: the responses.
            probed: sample indices that count in means and diversity; ``None``: all. The others are there because
                these were good.
        """
        self._sampled += len(rows)
        rewards: list[float] = []
        answers: list[tuple[int, ...]] = []
        parts: defaultdict[str, list[float]] = defaultdict(list)
        for row in rows:
            counts = probed is None or row.sample_index in probed
            if row.finish_reason != "failed":
                self._answered += 1
                self._tokens += row.length
                self._cut += row.finish_reason == "length"
                if counts:
                    answers.append(row.token_ids)
            if not row.usable:
                self._dropped[row.drop_reason or "non_finite_reward"] += 1
                continue
            self._usable += 1
            if not counts:
                continue
            rewards.append(row.reward or 0.0)
            for name, value in row.reward_parts.items():
                if math.isfinite(value):
                    parts[name].append(value)
        if rewards:
            self._scored_prompts += 1
            self._prompt_means += sum(rewards) / len(rewards)
        for name, values in parts.items():
            self._part_prompts[name] += 1
            self._part_means[name] += sum(values) / len(values)
        self._diversity.add(answers, rewards)

    def counts(self) -> dict[str, Any]:
        """Return how many responses were sampled, are usable, and were dropped by reason."""
        assert self._sampled == self._usable + self._dropped.total()
        return {"sampled": self._sampled, "usable": self._usable, "dropped": dict(self._dropped)}

    def metrics(self) -> dict[str, float]:
        """Return what the loggers get; lengths in tokens, rewards and their parts averaged over prompts."""
        parts = {
            f"iteration/reward/parts/{name}": total / self._part_prompts[name]
            for name, total in self._part_means.items()
        }
        reasons = {
            f"iteration/responses_dropped/{name}": float(count) for name, count in self._dropped.items()
        }
        return {
            "iteration/reward/mean": self._prompt_means / max(self._scored_prompts, 1),
            "iteration/response_length/mean": self._tokens / self._answered,
            "iteration/response_unfinished/share": self._cut / self._answered,
            **self._diversity.metrics(),
            **parts,
            **reasons,
        }
