"""Arguments of a run that a laptop finishes in seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def letter_reward(prompts: list[str], responses: list[str], metadata: list[dict[str, Any]]) -> list[float]:
    """A reward that varies with the text, for tests: share of lower-case letters, less a length term."""
    return [
        sum(character.islower() for character in response) / (len(response) + 1) - 0.001 * len(response)
        for response in responses
    ]


def variety_reward(prompts: list[str], responses: list[str], metadata: list[dict[str, Any]]) -> list[float]:
    """How many characters a text has that are not alike."""
    return [float(len(set(response))) for response in responses]


def cli_arguments(policy: Path, prompts: Path, root: Path, **changes: Any) -> list[str]:
    """Arguments of a run that a laptop finishes in seconds."""
    settings: dict[str, Any] = {
        "trainer.accelerator": "cpu",
        "trainer.precision": "32-true",
        "trainer.default_root_dir": root,
        "trainer.logger": "false",
        "model.policy.pretrained": policy,
        "model.reference": "previous_iteration",
        "model.loss": "sppo_lightning.losses.DPOLoss",
        "model.loss.beta": 0.1,
        "model.learning_rate": 1e-3,
        "data.prompts": prompts,
        "data.iterations": 2,
        "data.samples_per_prompt": 3,
        "data.probe_samples": 2,
        "data.selection": "sppo_lightning.selection.Easiest",
        "data.selection.fraction": 0.75,
        "data.generator": "sppo_lightning.generation.HFGenerator",
        "data.generator.max_new_tokens": 8,
        "data.generator.temperature": 1.0,
        "data.reward": "sppo_lightning.rewards.FunctionReward",
        "data.reward.function": "support.runs.letter_reward",
        "data.pairs_per_step": 4,
        "data.batch_size": 2,
        "data.prompts_per_shard": 5,
    }
    merged = {**settings, **{name.replace("__", "."): value for name, value in changes.items()}}
    return [f"--{name}={value}" for name, value in merged.items() if value is not None]
