"""Run folders as ``fit`` leaves them, made without a model: all follows from prompt, iteration and sample."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from sppo_lightning.difficulty import empty_difficulty_table, estimate_difficulty, reward_statistics
from sppo_lightning.evaluation.gate import Decision, write_decisions
from sppo_lightning.evaluation.stored import LOGPS
from sppo_lightning.resume.metrics_csv import MetricsCSV
from sppo_lightning.store.pairs import PairTable
from sppo_lightning.store.run_folder import RunFolder
from sppo_lightning.store.shards import write_rollouts
from sppo_lightning.system.durable import with_checksum, write_atomically
from sppo_lightning.types import PreferencePair, Rollout

STEPS = 5  # optimizer steps an iteration


def answer(prompt: str, iteration: int, sample: int) -> str:
    """A text that no other response has."""
    return f"answer {sample} to {prompt} in iteration {iteration}"


@dataclass(frozen=True)
class MadeRun:
    """A run's folder; prompts with an even number are selected, and of those whose number 4 divides rewards tie.

    Args:
        root: the folder.
        prompts: that are trained on.
        held_out: other prompts.
        iterations: finished ones.
        planned: of the config.
        samples: of a prompt, half of them from the probe.
        shard: prompts in a shard.
        lift: added to every reward.
        gain: of held-out answers in an iteration.
        text: of a prompt.
        response: of a sample, by the prompt's text, iteration and sample index.
        config: settings that the config has in addition.
    """

    root: Path
    prompts: int = 12
    held_out: int = 4
    iterations: int = 2
    planned: int = 2
    samples: int = 4
    shard: int = 5
    lift: float = 0.0
    gain: float = 0.2
    text: Callable[[str], str] = "say {}".format
    response: Callable[[str, int, int], str] = answer
    config: Mapping[str, Any] = field(default_factory=dict)

    @property
    def folder(self) -> RunFolder:
        return RunFolder(self.root)

    def write(self) -> MadeRun:
        """Write all files."""
        config = {
            "seed_everything": 3,
            "trainer": {"default_root_dir": str(self.root.resolve())},
            "model": {"policy": {"pretrained": "/models/tiny"}, "learning_rate": 1e-3},
            "data": {"iterations": self.planned, "epochs_per_iteration": 1},
            **self.config,
        }
        self.root.mkdir(parents=True, exist_ok=True)
        self.folder.config.write_text(yaml.safe_dump(config))
        self.evaluate(0)
        metrics = MetricsCSV(self.folder.metrics)
        for iteration in range(self.iterations):
            first = iteration * STEPS
            metrics.log_metrics({"iteration/number": float(iteration)}, first)
            for step in range(first, first + STEPS):
                metrics.log_metrics({"train/loss": 1 / (1 + step), "train/lr": 1e-3}, step)
            self.iterate(iteration)
            self.evaluate(iteration + 1)
            times = {"time/probing": 2.0, "time/training": 5.0, "time/other": 1.0}
            metrics.log_metrics(times, first + STEPS)
        decisions = [
            Decision(number, "accept", (), number, 0.1, 0.01, 1.0, "a policy")
            for number in range(1, self.iterations + 1)
        ]
        write_decisions(self.folder, decisions)
        return self

    def reward(self, number: int, iteration: int, sample: int) -> float:
        """Of a sampled response: later iterations are better, and the first prompts are the hardest."""
        differs = 0.0 if number % 4 == 0 else 0.01 * sample
        return number / self.prompts + 0.1 * iteration + differs + self.lift

    def rollouts(self, number: int, iteration: int, samples: range) -> list[Rollout]:
        text = self.text(f"p{number}")
        return [
            Rollout(
                f"p{number}",
                sample,
                text,
                self.response(text, iteration, sample),
                tuple(range(5 + sample)),
                "length" if sample == 3 else "stop",
                self.reward(number, iteration, sample),
                {"style": 0.25},
            )
            for sample in samples
        ]

    def iterate(self, iteration: int) -> None:
        """Write an iteration's data."""
        store = self.folder.iteration(iteration)
        probe = range(self.samples // 2)
        rewards = {}
        for start in range(0, self.prompts, self.shard):
            numbers = range(start, min(start + self.shard, self.prompts))
            rows = [row for number in numbers for row in self.rollouts(number, iteration, probe)]
            store.shards.write("probe", start // self.shard, rows)
            for row in rows:
                rewards.setdefault(row.prompt_id, []).append(row.reward)
        selected = list(range(0, self.prompts, 2))
        rest = range(self.samples // 2, self.samples)
        for start in range(0, len(selected), self.shard):
            numbers = selected[start : start + self.shard]
            rows = [row for number in numbers for row in self.rollouts(number, iteration, rest)]
            store.shards.write("topup", start // self.shard, rows)
        table = estimate_difficulty(
            reward_statistics(rewards), empty_difficulty_table(), iteration=iteration, smoothing=0.0
        )
        store.write_difficulty(table, {f"p{number}" for number in selected})
        paired = [number for number in selected if number % 4]
        store.write_pairs(PairTable.collect(self.pair(number, iteration) for number in paired))
        dropped = {
            "not_selected": self.prompts - len(selected),
            "tied_rewards": len(selected) - len(paired),
        }
        sampled = (self.prompts + len(selected)) * self.samples // 2
        store.write_manifest(
            {
                "iteration": iteration,
                "complete": True,
                "counts": {
                    "prompts": self.prompts,
                    "pairs": len(paired),
                    "selected": len(selected),
                    "paired_prompts": len(paired),
                },
                "dropped": dropped,
                "responses": {"sampled": sampled, "usable": sampled, "dropped": {}},
                "metrics": {
                    "iteration/reward/mean": 0.5,
                    **{f"iteration/difficulty/q{share}": share / 100 for share in (25, 50, 75)},
                },
                "rule_states": {},
                "smoothing": 0.0,
                "policy_fingerprint": "a policy",
            }
        )
        diagnostics = {"val/kl/initial": 0.05 * (iteration + 1), "learning/logratios/chosen": -0.5}
        write_atomically(store.diagnostics_path, with_checksum(diagnostics))

    def pair(self, number: int, iteration: int) -> PreferencePair:
        """Return the pair of the last and the first response."""
        first, *_, last = self.rollouts(number, iteration, range(self.samples))
        assert first.reward is not None
        assert last.reward is not None
        return PreferencePair(
            prompt_id=first.prompt_id,
            prompt_token_ids=(1, 2),
            chosen_token_ids=last.token_ids,
            rejected_token_ids=first.token_ids,
            chosen=last.response,
            rejected=first.response,
            chosen_reward=last.reward,
            rejected_reward=first.reward,
            reference_chosen_logp=-8.0,
            reference_rejected_logp=-4.0,
            chosen_sample_index=last.sample_index,
            rejected_sample_index=first.sample_index,
        )

    def evaluate(self, finished: int) -> None:
        """Write the held-out answers after some iterations."""
        place = self.folder.evaluation(f"{finished:03d}")
        rows = []
        for number in range(self.held_out):
            text = self.text(f"held out {number}")
            reward = 0.1 * number + self.gain * finished + 0.05 * finished * number + self.lift
            tokens = tuple(range(10 - finished))
            rows.append(
                Rollout(f"e{number}", 0, text, self.response(text, finished, 0), tokens, "stop", reward)
            )
        write_rollouts(place / "rollouts.parquet", rows)
        divergences = {row.prompt_id: 0.05 * finished * (1 + 0.1 * n) for n, row in enumerate(rows, -1)}
        content = {
            "logps": {row.prompt_id: -3.0 for row in rows},
            "divergences": {"0": divergences} if finished else {},
        }
        write_atomically(place / LOGPS, with_checksum(content))
