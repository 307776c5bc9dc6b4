"""How much the responses to a prompt differ from each other, as they stream by."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from statistics import stdev

NGRAMS = (1, 2)


class Diversity:
    """Running sums over prompts with two or more responses.

    ``distinct_n``: distinct n-grams of tokens over all n-grams of a prompt's responses (Li et al. 2016, arXiv
    1510.03055), averaged over prompts.
    """

    def __init__(self) -> None:
        self._responses = 0
        self._repeated = 0
        self._distinct = dict.fromkeys(NGRAMS, 0.0)
        self._with_grams: Counter[int] = Counter()
        self._first_tokens: Counter[int] = Counter()
        self._scored = 0
        self._spread = 0.0
        self._tied = 0

    def add(self, answers: Sequence[tuple[int, ...]], rewards: Sequence[float]) -> None:
        """Count the responses to one prompt.

        Args:
            answers: token ids of each.
            rewards: finite ones, of some of them.
        """
        self._first_tokens.update(answer[0] for answer in answers if answer)
        if len(rewards) > 1:
            self._scored += 1
            self._spread += stdev(rewards)
            self._tied += max(rewards) == min(rewards)
        if len(answers) < 2:
            return
        self._responses += len(answers)
        self._repeated += len(answers) - len(set(answers))
        for n in NGRAMS:
            grams = [answer[i : i + n] for answer in answers for i in range(len(answer) - n + 1)]
            if grams:
                self._with_grams[n] += 1
                self._distinct[n] += len(set(grams)) / len(grams)

    def metrics(self) -> dict[str, float]:
        """Return what the loggers get.

        The entropy of the first tokens is that of their frequencies over all responses, in nats.
        """
        found = {}
        if self._responses:
            found["iteration/responses_identical/share"] = self._repeated / self._responses
        for n in NGRAMS:
            if self._with_grams[n]:
                found[f"iteration/diversity/distinct_{n}"] = self._distinct[n] / self._with_grams[n]
        if self._scored:
            found["iteration/reward/spread"] = self._spread / self._scored
            found["iteration/reward/tied_share"] = self._tied / self._scored
        total = self._first_tokens.total()
        if total:
            shares = [count / total for count in self._first_tokens.values()]
            found["iteration/first_token/entropy"] = sum(-share * math.log(share) for share in shares) + 0.0
        return found
