"""Rewards: prompts and response texts in, one number a response out; chosen by ``data.reward``.

A non-finite number, or ``None``, drops that response under a named reason. A reward that compares a prompt's
responses with each other (``comparative``) gets all of them in one call; one whose rewards themselves are comparisons
gives no difficulty to select by.
"""

from sppo_lightning.rewards.classifier import SequenceClassificationReward
from sppo_lightning.rewards.combined import CombinedReward
from sppo_lightning.rewards.function import FunctionReward
from sppo_lightning.rewards.judge import OpenAIJudge
from sppo_lightning.rewards.length import LengthPenalty
from sppo_lightning.rewards.metric import TorchmetricsReward
from sppo_lightning.rewards.pairwise import Comparison, FunctionJudge, Judge, PairwiseReward
from sppo_lightning.rewards.protocol import Reward, Scores
from sppo_lightning.rewards.server import JSONRewards, ScoreFormat, ServerReward, SGLangClassify, VLLMPooling
from sppo_lightning.rewards.win_probability import WinProbabilityReward

__all__ = [
    "CombinedReward",
    "Comparison",
    "FunctionJudge",
    "FunctionReward",
    "JSONRewards",
    "Judge",
    "LengthPenalty",
    "OpenAIJudge",
    "PairwiseReward",
    "Reward",
    "SGLangClassify",
    "ScoreFormat",
    "Scores",
    "SequenceClassificationReward",
    "ServerReward",
    "TorchmetricsReward",
    "VLLMPooling",
    "WinProbabilityReward",
]
