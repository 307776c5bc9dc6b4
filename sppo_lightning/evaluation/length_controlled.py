"""The length-controlled win rate of AlpacaEval 2 (arXiv 2404.04475): what it would be if answers were equally long."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from inspect import signature
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sppo_lightning.evaluation.win_rate import COVERAGE
from sppo_lightning.types import UserError, first_line

FOLDS = 5
REFITS = 300  # bootstrap samples of the length-controlled win rate
GAMED_WEIGHT = 0.2  # of the gamed baselines, together
SOLVER: dict[str, Any] = {"solver": "liblinear", "fit_intercept": False, "random_state": 123}  # AlpacaEval's

Floats = NDArray[np.float64]


class LengthControlledWinRate(NamedTuple):
    """What the win rate would be if answers were as long as the others, after AlpacaEval 2 (arXiv 2404.04475)."""

    name: str  # of AlpacaEval's model: ``length_controlled_v1``, or ``length_controlled_minimal`` without difficulties
    rate: float  # in [0, 1]; NaN where fewer prompts than :data:`FOLDS` have a preference
    low: float  # bootstrap interval over prompts, at the penalty of the fit to all; where that is 0, at the weakest
    high: float
    stderr: (
        float  # AlpacaEval's: of the mean prediction, the fit's own error left out; 0 without difficulties
    )
    length_weight: float  # of the difference of lengths: above 0, longer answers win


@dataclass(frozen=True)
class GamedBaselines:
    """How hard AlpacaEval's prompts are, and comparisons of a baseline with longer and shorter versions of itself.

    The content of its ``df_gamed.csv``; a comparison's length difference is in standard deviations.

    Args:
        difficulties: of each prompt, in AlpacaEval's order.
        preferences: of each comparison, in [0, 1].
        lengths: differences of length, in standard deviations.
        comparison_difficulties: of each comparison's prompt.
        gamed: whether a comparison is with such a version.
    """

    difficulties: Floats
    preferences: Floats
    lengths: Floats
    comparison_difficulties: Floats
    gamed: NDArray[np.bool_]


_COLUMNS = ("index", "preference", "std_delta_len", "instruction_difficulty", "not_gamed_baseline")
_TRUTH = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}


def read_gamed_baselines(path: Path) -> GamedBaselines:
    """Read AlpacaEval's ``df_gamed.csv``, of the data set ``tatsu-lab/alpaca_eval``.

    Raises:
        UserError: if it cannot be read, lacks a column, or does not begin with one row a prompt, in order.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            missing = [name for name in _COLUMNS if name not in (reader.fieldnames or ())]
            if missing:
                raise UserError(
                    f"{path} has no column {missing[0]!r}: name AlpacaEval's df_gamed.csv, of tatsu-lab/alpaca_eval"
                )
            rows = list(reader)
        columns = {name: np.array([_number(row[name]) for row in rows]) for name in _COLUMNS[1:4]}
        prompts = [int(float(row["index"])) for row in rows]
        not_gamed = np.array([_TRUTH[row["not_gamed_baseline"].strip().lower()] for row in rows], dtype=bool)
    except UserError:
        raise
    except (OSError, UnicodeDecodeError, csv.Error, ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(
            f"{path} cannot be read as difficulties ({first_line(error)}): name AlpacaEval's df_gamed.csv, of "
            "tatsu-lab/alpaca_eval"
        ) from error
    count = len(set(prompts))
    if not rows or prompts[:count] != list(range(count)):
        raise UserError(
            f"{path} does not begin with one row a prompt, in the order of 'index' from 0: difficulties belong to "
            "prompts by their number"
        )
    return GamedBaselines(
        difficulties=columns["instruction_difficulty"][:count],
        preferences=columns["preference"],
        lengths=columns["std_delta_len"],
        comparison_difficulties=columns["instruction_difficulty"],
        gamed=~not_gamed,
    )


def _number(text: str) -> float:
    return float(text) if text.strip() else math.nan


def has_scikit_learn() -> bool:
    """Whether :func:`length_controlled_win_rate` can be computed here."""
    return find_spec("sklearn") is not None


def length_controlled_win_rate(
    preferences: Sequence[float],
    lengths: Sequence[int],
    other_lengths: Sequence[int],
    *,
    seed: int,
    gamed: GamedBaselines | None = None,
    resamples: int = REFITS,
) -> LengthControlledWinRate:
    """Return the length-controlled win rate as AlpacaEval 0.6.6 defines it (``metrics/glm_winrate.py``).

    A logistic regression without intercept, L1 penalty by cross-validation, of the preferences on tanh of the
    difference of lengths in standard deviations, a constant and, with ``gamed``, the prompt's difficulty. It is read at
    no difference of lengths: ``rate`` is the mean prediction over all prompts, those without a preference included.
    With ``gamed`` it is also fitted to the comparisons there, at a weight of 0.2 for both versions together.

    Args:
        preferences: one a prompt; NaN where it is not known.
        lengths: of the answers, in characters.
        other_lengths: of those they are compared with, in characters.
        seed: decides the draws of the interval.
        gamed: difficulties, of as many prompts; ``None``: the model without them, called minimal.
        resamples: bootstrap samples, each a fit.

    Raises:
        UserError: if scikit-learn is missing, or the difficulties are of another number of prompts.
    """
    if not has_scikit_learn():
        raise UserError(
            "the length-controlled win rate needs scikit-learn: pip install 'sppo-lightning[judge]'"
        )
    name = "length_controlled_minimal" if gamed is None else "length_controlled_v1"
    wanted = np.array(preferences, dtype=np.float64)
    if gamed is not None and len(gamed.difficulties) != len(wanted):
        raise UserError(
            f"there are difficulties of {len(gamed.difficulties)} prompts, but {len(wanted)} are compared: they belong "
            "to AlpacaEval's prompts, all of them, in its order"
        )
    known = np.isfinite(wanted)
    if known.sum() < FOLDS:
        return LengthControlledWinRate(name, math.nan, math.nan, math.nan, math.nan, math.nan)
    # AlpacaEval's difference is the others' length less the answers'
    difference = np.array(other_lengths, dtype=np.float64) - np.array(lengths, dtype=np.float64)
    spread = difference.std(ddof=1)
    standardised = difference / spread if spread > 0 else difference
    design = _design(standardised, None if gamed is None else gamed.difficulties, np.ones_like(wanted))
    equal_lengths = design.copy()
    equal_lengths[:, 0] = 0
    fitted = _Comparisons(design[known], wanted[known], np.ones(int(known.sum())))
    if gamed is not None:
        more = _design(gamed.lengths, gamed.comparison_difficulties, (~gamed.gamed).astype(np.float64))
        weights = np.where(gamed.gamed, GAMED_WEIGHT / 2, 1.0)
        usable = np.isfinite(gamed.preferences)
        fitted = _Comparisons(more[usable], gamed.preferences[usable], weights[usable]).and_then(fitted)
    if fitted.one_sided:  # there is nothing to fit
        rate = float(fitted.preferences[0])
        return LengthControlledWinRate(name, rate, rate, rate, 0.0, 0.0)
    model = _fitted_by_validation(fitted)
    predicted = model.predict_proba(equal_lengths)[:, 1]
    # at a penalty that leaves nothing but 0 each refit gives one half, however few the prompts
    strength = float(np.ravel(model.C_)[0] if model.coef_.any() else np.max(model.Cs_))
    rates = _refitted_rates(fitted, equal_lengths, known, strength=strength, seed=seed, resamples=resamples)
    low, high = np.quantile(rates, [(1 - COVERAGE) / 2, (1 + COVERAGE) / 2]).tolist()
    stderr = float(predicted.std(ddof=1) / math.sqrt(len(predicted)))
    rate = float(predicted.mean())
    # of very few prompts the refits may all lie on one side of it
    low, high = min(low, rate), max(high, rate)
    return LengthControlledWinRate(name, rate, low, high, stderr, -float(model.coef_[0][0]))


def _design(lengths: Floats, difficulties: Floats | None, baseline: Floats) -> Floats:
    """Return the regressors, ``[prompts, 2 or 3]``; their order decides the solver's last digits."""
    columns = [np.tanh(lengths), *([] if difficulties is None else [difficulties]), baseline]
    return np.stack(columns, axis=1)


class _Comparisons(NamedTuple):
    """What a regression is fitted to."""

    design: Floats  # [N, 2 or 3]
    preferences: Floats  # [N]
    weights: Floats  # [N]

    def and_then(self, others: _Comparisons) -> _Comparisons:
        """Return these and others."""
        return _Comparisons(*(np.concatenate(both) for both in zip(self, others, strict=True)))

    @property
    def one_sided(self) -> bool:
        """Whether all that count were won, or all lost: no regression has an end."""
        counted = self.preferences[self.weights > 0]
        return bool((counted == counted[0]).all()) and float(counted[0]) in (0.0, 1.0)

    @property
    def rows(self) -> tuple[Floats, NDArray[np.int64], Floats]:
        """Each comparison twice, won and lost, with its share: how scikit-learn takes probabilities."""
        shares = np.concatenate([self.preferences, 1 - self.preferences])
        return np.concatenate([self.design, self.design]), np.repeat([1, 0], len(self.preferences)), shares


def _fitted_by_validation(comparisons: _Comparisons) -> Any:
    """Fit with the penalty that predicts the comparisons of left out prompts best."""
    import sklearn
    from sklearn.linear_model import LogisticRegressionCV
    from sklearn.metrics import make_scorer
    from sklearn.model_selection import GroupKFold

    penalty = _l1_penalty(LogisticRegressionCV, {"l1_ratios": (1.0,), "use_legacy_attributes": False})
    design, won, shares = comparisons.rows
    weights = np.tile(comparisons.weights, 2)
    with sklearn.config_context(enable_metadata_routing=True):
        scorer = make_scorer(_log_loss, response_method="predict_proba", greater_is_better=False)
        model = LogisticRegressionCV(
            cv=GroupKFold(n_splits=FOLDS),
            scoring=scorer.set_score_request(shares=True, weights=True),
            **SOLVER,
            **penalty,
        ).set_fit_request(sample_weight=True)
        return model.fit(
            design,
            won,
            sample_weight=shares * weights,
            groups=np.tile(np.arange(len(comparisons.preferences)), 2),
            shares=shares,
            weights=weights,
        )


def _l1_penalty(kind: type, newer: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments that ask for the L1 penalty: ``newer`` from scikit-learn 1.8 on."""
    given = signature(kind).parameters.get("penalty")
    return {"penalty": "l1"} if given is not None and given.default == "l2" else newer


def _log_loss(won: Floats, predicted: Floats, shares: Floats, weights: Floats) -> float:
    """Return the mean log loss of predicted probabilities, nats, in terms of the preferences themselves."""
    preferences = np.where(won == 1, shares, 1 - shares)
    predicted = np.clip(predicted, 1e-15, 1 - 1e-15)
    likelihoods = preferences * np.log(predicted) + (1 - preferences) * np.log(1 - predicted)
    return -float(np.mean(likelihoods * weights))


def _refitted_rates(
    comparisons: _Comparisons,
    equal_lengths: Floats,
    known: NDArray[np.bool_],
    *,
    strength: float,
    seed: int,
    resamples: int,
) -> list[float]:
    """Return the length-controlled win rate of bootstrap samples of the prompts, which come last in ``comparisons``."""
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(C=strength, **SOLVER, **_l1_penalty(LogisticRegression, {"l1_ratio": 1.0}))
    design, won, shares = comparisons.rows
    generator = np.random.default_rng(seed)
    prompts, rates = len(known), []
    for _ in range(resamples):
        drawn = np.bincount(generator.integers(prompts, size=prompts), minlength=prompts).astype(np.float64)
        weights = comparisons.weights.copy()
        weights[len(weights) - int(known.sum()) :] *= drawn[known]
        sample = comparisons._replace(weights=weights)
        if not weights.any():
            continue
        if sample.one_sided:
            rates.append(float(sample.preferences[weights > 0][0]))
            continue
        model.fit(design, won, sample_weight=shares * np.tile(weights, 2))
        rates.append(float(np.average(model.predict_proba(equal_lengths)[:, 1], weights=drawn)))
    return rates
