"""A reward that changes another one."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence

import torch

from sppo_lightning.rewards.protocol import Reward, RewardMemory
from sppo_lightning.types import Prompt


class WrappedReward(Reward):
    """Everything but the scores is the other reward's.

    Args:
        reward: the other one.
    """

    def __init__(self, reward: Reward) -> None:
        self.reward = reward

    @abstractmethod
    def around(self, reward: Reward) -> Reward:
        """Return the same change of another reward."""

    @property
    def comparative(self) -> bool:
        """Whether the other reward compares a prompt's responses with each other."""
        return self.reward.comparative

    @property
    def remote(self) -> bool:
        """Whether the other reward scores on a server."""
        return self.reward.remote

    def check(self) -> None:
        """Check the other reward."""
        self.reward.check()

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        """Check the prompts for the other reward."""
        self.reward.check_prompts(prompts)

    def memory(self, device: torch.device, tokens: int) -> RewardMemory:
        """Return what the other reward takes."""
        return self.reward.memory(device, tokens)

    def smaller(self) -> Mapping[str, Reward]:
        """Let the other reward take less."""
        return {
            f"init_args.reward.{setting}": self.around(other)
            for setting, other in self.reward.smaller().items()
        }

    def load(self, device: torch.device) -> None:
        """Load the other reward."""
        self.reward.load(device)

    def unload(self) -> None:
        """Unload the other reward."""
        self.reward.unload()
