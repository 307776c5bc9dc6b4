"""A torchmetrics text metric of the response against the prompt's reference answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torchmetrics.text
from torchmetrics import Metric

from sppo_lightning.rewards.protocol import Reward
from sppo_lightning.types import Prompt, UserError, first_line


def _squad(response: str, answer: str) -> tuple[Any, Any]:
    target = {"answers": {"answer_start": [0], "text": [answer]}, "id": "0"}
    return [{"prediction_text": response, "id": "0"}], [target]


def _several_references(response: str, answer: str) -> tuple[Any, Any]:
    return [response], [[answer]]


def _one_reference(response: str, answer: str) -> tuple[Any, Any]:
    return [response], [answer]


_FORMATS: list[tuple[tuple[type, ...], Callable[[str, str], tuple[Any, Any]]]] = [
    ((torchmetrics.text.SQuAD,), _squad),
    (
        (
            torchmetrics.text.BLEUScore,
            torchmetrics.text.CHRFScore,
            torchmetrics.text.TranslationEditRate,
            torchmetrics.text.ExtendedEditDistance,
        ),
        _several_references,
    ),
]


def _higher_is_better(metric: Metric) -> bool:
    if isinstance(metric, torchmetrics.text.WordInfoPreserved):
        return True  # 1 is perfect, but torchmetrics 1.9 says that lower is better
    return metric.higher_is_better is not False


class TorchmetricsReward(Reward):
    """Scores a response with a torchmetrics text metric against the prompt's ``answer``.

    A metric where lower is better counts negatively.

    Args:
        metric: a text metric, e.g. ``torchmetrics.text.SQuAD``.
        output: which of the metric's outputs to take, e.g. ``f1``; needed where it has several.
        scale: multiplies the metric; 0.01 turns per cent into a share.
    """

    def __init__(self, metric: Metric, output: str | None = None, scale: float = 1.0) -> None:
        self.metric = metric
        # each process scores its own responses: a mean over processes would mix them
        metric.distributed_available_fn = lambda: False
        self.output = output
        self.scale = scale
        self._format = next(
            (form for classes, form in _FORMATS if isinstance(metric, classes)), _one_reference
        )

    def check(self) -> None:
        """Try the metric on one answer, so that a wrong setting is found before anything is sampled."""
        name = type(self.metric).__name__
        try:
            value = self._compute("a", "a")
            self._measure("a", "a")
        except UserError:
            raise
        except Exception as error:
            raise UserError(
                f"data.reward.metric: {name} does not compare two texts ({type(error).__name__}: "
                f"{first_line(error)}): use a metric of torchmetrics.text"
            ) from error
        if self.output is not None and not isinstance(value, dict):
            raise UserError(
                f"TorchmetricsReward.output={self.output!r}: {name} gives one number: leave it out"
            )

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        """Require a reference answer of every prompt."""
        missing = [prompt.id for prompt in prompts if prompt.answer is None]
        if missing:
            raise UserError(
                f"{len(missing)} of {len(prompts)} prompts have no 'answer' (first: {missing[0]!r}), which "
                "TorchmetricsReward compares with: add the column, or use another data.reward"
            )

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
        """Return the scaled metric of each response on its own."""
        return [
            self._measure(response, prompt.answer or "")
            for prompt, response in zip(prompts, responses, strict=True)
        ]

    def _compute(self, response: str, answer: str) -> Any:
        if isinstance(self.metric, torchmetrics.text.TranslationEditRate):
            said, wanted = (self.metric.tokenizer(text.rstrip()) for text in (response, answer))
            if wanted and not said:
                return 1.0  # every word is missing; torchmetrics 1.9 gives 0, a perfect score
        self.metric.reset()
        self.metric.update(*self._format(response, answer))
        return self.metric.compute()

    def _measure(self, response: str, answer: str) -> float:
        value = self._compute(response, answer)
        if isinstance(value, dict):
            if self.output not in value:
                raise UserError(
                    f"TorchmetricsReward.output={self.output!r}: {type(self.metric).__name__} gives "
                    f"{', '.join(value)}: choose one"
                )
            value = value[self.output]
        return (self.scale if _higher_is_better(self.metric) else -self.scale) * float(value)
