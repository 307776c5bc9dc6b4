"""Which of two sets of answers is better: the command ``sppo-lightning judge``.

Answers come from runs and files, and are compared prompt by prompt, by an :class:`Annotator`: a run's reward, a model
on a server, or a class of the user's own. Each verdict of a server is on disk once it is there, so that the same
command continues. What is written at the end is read by AlpacaEval.
"""

from sppo_lightning.judging.by_reward import RewardAnnotator
from sppo_lightning.judging.by_server import ServerJudge
from sppo_lightning.judging.contract import Annotator, Answer, AnswerSet, Shown, Verdict
from sppo_lightning.judging.verdict_formats import LabelProbabilities, Reading, VerdictFormat, WrittenVerdict

__all__ = [
    "Annotator",
    "Answer",
    "AnswerSet",
    "LabelProbabilities",
    "Reading",
    "RewardAnnotator",
    "ServerJudge",
    "Shown",
    "Verdict",
    "VerdictFormat",
    "WrittenVerdict",
]
