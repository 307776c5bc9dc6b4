"""Answers to ``predict_prompts``, in the formats that judges read.

A format says what it asks after the first turn, and makes records of the answers; it gets one prediction for each
record of the prompt file, in the file's order, repeated and unanswered prompts included. Answers are greedy.
"""

from sppo_lightning.predictions.contract import Prediction, PredictionFormat
from sppo_lightning.predictions.formats import AlpacaEval, ArenaHard, JSONLines, MTBench

__all__ = ["AlpacaEval", "ArenaHard", "JSONLines", "MTBench", "Prediction", "PredictionFormat"]
