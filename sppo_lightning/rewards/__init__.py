"""Reward models and functions."""

from sppo_lightning.rewards.classifier import SequenceClassificationReward
from sppo_lightning.rewards.function import FunctionReward
from sppo_lightning.rewards.metric import TorchmetricsReward
from sppo_lightning.rewards.protocol import Reward

__all__ = ["FunctionReward", "Reward", "SequenceClassificationReward", "TorchmetricsReward"]
