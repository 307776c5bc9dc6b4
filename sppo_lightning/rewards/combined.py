"""A weighted sum of several rewards."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from sppo_lightning.rewards.protocol import Reward, RewardMemory, Scores, checked_scores
from sppo_lightning.types import Prompt


class CombinedReward(Reward):
    """Scores with the weighted sum of several rewards, each of which is logged apart under its name.

    A response that one of them cannot score is dropped under that one's reason; a reward of weight 0 is logged only,
    and drops nothing. All are loaded together, so they must fit on the device side by side.

    Args:
        rewards: what is summed, by name.
        weights: of each reward, under the same names.
    """

    def __init__(self, rewards: dict[str, Reward], weights: dict[str, float]) -> None:
        if set(rewards) != set(weights):
            lacking = ", ".join(sorted(set(rewards) - set(weights))) or "none"
            unknown = ", ".join(sorted(set(weights) - set(rewards))) or "none"
            raise ValueError(
                f"CombinedReward.weights must have the names of rewards; rewards without a weight: {lacking}; "
                f"weights without a reward: {unknown}"
            )
        for name, weight in weights.items():
            if not math.isfinite(weight):
                raise ValueError(f"CombinedReward.weights.{name}={weight} must be a finite number")
        if not any(weights.values()):
            raise ValueError(
                f"CombinedReward.weights={weights} leave every reward 0: give one a weight other than 0"
            )
        self.rewards = rewards
        self.weights = weights

    @property
    def comparative(self) -> bool:
        """Whether one of the rewards compares a prompt's responses with each other."""
        return any(reward.comparative for reward in self.rewards.values())

    @property
    def remote(self) -> bool:
        """Whether all of them score on servers."""
        return all(reward.remote for reward in self.rewards.values())

    def check(self) -> None:
        """Check every reward."""
        for reward in self.rewards.values():
            reward.check()

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        """Check the prompts for every reward."""
        for reward in self.rewards.values():
            reward.check_prompts(prompts)

    def memory(self, device: torch.device, tokens: int) -> RewardMemory:
        """Add up what the rewards take; they score in turn."""
        found = [reward.memory(device, tokens) for reward in self.rewards.values()]
        return RewardMemory(
            weights=sum(part.weights for part in found),
            conversation=max((part.conversation for part in found), default=0),
            waiting=sum(part.waiting for part in found),
        )

    def smaller(self) -> Mapping[str, Reward]:
        """Let one of the rewards take less."""
        return {
            f"init_args.rewards.{name}.{setting}": CombinedReward({**self.rewards, name: other}, self.weights)
            for name, reward in self.rewards.items()
            for setting, other in reward.smaller().items()
        }

    def load(self, device: torch.device) -> None:
        """Load every reward."""
        for reward in self.rewards.values():
            reward.load(device)

    def unload(self) -> None:
        """Unload every reward."""
        for reward in self.rewards.values():
            reward.unload()

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> Scores:
        """Score with each reward in turn, and sum."""
        totals = [0.0] * len(responses)
        reasons: dict[int, str] = {}
        parts: dict[str, Sequence[float]] = {}
        error: str | None = None
        for name, reward in self.rewards.items():
            found = checked_scores(reward, prompts, responses)
            error = error or found.error
            parts[name] = found.rewards
            parts |= {f"{name}/{part}": values for part, values in found.parts.items()}
            if self.weights[name] != 0:
                reasons = {**found.reasons, **reasons}
                totals = [
                    total + self.weights[name] * score
                    for total, score in zip(totals, found.rewards, strict=True)
                ]
        return Scores(
            [math.nan if row in reasons else total for row, total in enumerate(totals)], reasons, parts, error
        )
