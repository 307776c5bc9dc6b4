"""A run's reward as annotator: the higher reward wins."""

from __future__ import annotations

from argparse import ArgumentError
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from jsonargparse import ArgumentParser

from sppo_lightning.evaluation.stored import load_evaluation
from sppo_lightning.evaluation.win_rate import reward_preferences
from sppo_lightning.judging.contract import Annotator, Answer, AnswerSet, Shown, Verdict
from sppo_lightning.prompts.sets import PromptSets
from sppo_lightning.redaction import masked, masked_keys
from sppo_lightning.rewards import Reward
from sppo_lightning.rewards.comparisons import compares_responses
from sppo_lightning.rollouts.scoring import score_rows
from sppo_lightning.types import Prompt, Rollout, UserError, first_line

AT_ONCE = 256  # comparisons whose answers are scored in one call


class RewardAnnotator(Annotator):
    """Compares rewards: stored ones, and those of the run's own reward where a set has none of the same reward.

    The reward is that of the judged run, or else of the run that it is compared with.

    Args:
        device: where the reward is loaded, if it has to be.
    """

    name = "reward"
    both_orders = False
    keeps_verdicts = False

    def __init__(self, device: str = "cpu") -> None:
        self.device = device
        self._source = ""  # the run whose reward it is
        self._settings: Mapping[str, Any] = {}

    def prepare(self, judged: AnswerSet, others: AnswerSet) -> tuple[AnswerSet, AnswerSet]:
        """Return the sets without rewards that another reward gave, and, to score by, with the run's own prompts."""
        runs = [each for each in (judged, others) if each.run is not None]
        if not runs:
            raise UserError(
                f"neither {judged.source} nor {others.source} is a run, so that there is no reward to compare by: use "
                "--by judge"
            )
        self._source, self._settings = runs[0].source, runs[0].settings
        wanted = masked(_reward_settings(runs[0]))
        known = [
            each.run is not None and masked(_reward_settings(each)) == wanted for each in (judged, others)
        ]
        if all(known):
            _check_opponents(judged, others)
            return judged, others
        prompts = _prompts_of(runs[0])
        found = [
            each
            if is_known
            else replace(each, answers=[answer._replace(reward=None) for answer in each.answers])
            for each, is_known in zip((judged, others), known, strict=True)
        ]
        owner = 0 if judged.run is not None else 1
        found[owner] = replace(
            found[owner],
            answers=[
                answer._replace(prompt=prompts.get(answer.prompt.id, answer.prompt))
                for answer in found[owner].answers
            ],
        )
        return found[0], found[1]

    def judge(self, comparisons: Sequence[Shown]) -> Iterator[tuple[int, Verdict]]:
        """Compare rewards, after those that are missing are computed."""
        reward = self._loaded() if any(_unscored(shown) for shown in comparisons) else None
        try:
            for start in range(0, len(comparisons), AT_ONCE):
                part = comparisons[start : start + AT_ONCE]
                firsts, seconds = (_rewards(reward, part, side) for side in ("first", "second"))
                for position, first_wins in enumerate(reward_preferences(firsts, seconds), start):
                    known = first_wins == first_wins  # NaN is no number
                    yield position, Verdict(first_wins, "" if known else "no_reward")
        finally:
            if reward is not None:
                reward.unload()

    def _loaded(self) -> Reward:
        reward = _instantiated(self._settings["data"]["reward"], self._source)
        if reward.comparative:
            raise UserError(
                f"data.reward {type(reward).__name__} of {self._source} compares a prompt's responses with each other, "
                "and has no reward of a single one: use --by judge"
            )
        try:
            device = torch.device(self.device)
        except RuntimeError as error:
            raise UserError(f"--by.device={self.device} is no device ({first_line(error)})") from error
        reward.check()
        reward.load(device)
        return reward


def _check_opponents(judged: AnswerSet, others: AnswerSet) -> None:
    """Refuse stored rewards that are win probabilities against different answers.

    Raises:
        UserError: if the runs' initial policies answered differently.
    """
    if not compares_responses(_reward_settings(judged)):
        return
    first, second = (
        None if each.run is None else load_evaluation(each.run.evaluation("000")) for each in (judged, others)
    )
    if _texts(first) != _texts(second):
        raise UserError(
            f"the rewards of {judged.source} and {others.source} are comparisons with each run's own initial policy, "
            "whose answers differ: use --by judge"
        )


def _texts(rows: Sequence[Rollout] | None) -> dict[str, str]:
    return {row.prompt_id: row.response for row in rows or ()}


def _unscored(shown: Shown) -> bool:
    return shown.first.reward is None or shown.second.reward is None


def _rewards(reward: Reward | None, comparisons: Sequence[Shown], side: str) -> list[float | None]:
    """Return the rewards of one side's answers, computed where none is stored."""
    answers: list[Answer] = [getattr(shown, side) for shown in comparisons]
    missing = [number for number, answer in enumerate(answers) if answer.reward is None]
    found: list[float | None] = [answer.reward for answer in answers]
    if missing and reward is not None:
        prompts = {str(number): comparisons[number].prompt for number in missing}
        rows = [Rollout(str(number), 0, "", answers[number].text, (), "stop", None) for number in missing]
        for number, row in zip(missing, score_rows(reward, rows, prompts).rows, strict=True):
            found[number] = row.reward
    return found


def _reward_settings(answers: AnswerSet) -> Any:
    try:
        return answers.settings["data"]["reward"]
    except (KeyError, TypeError) as error:
        raise UserError(f"the config.yaml of {answers.source} names no data.reward: restore it") from error


def _prompts_of(answers: AnswerSet) -> Mapping[str, Prompt]:
    """Return a run's held-out prompts as its files have them, with what a reward may read of them."""
    settings = answers.settings
    data = settings["data"]
    sets = PromptSets(
        {"prompts": data.get("prompts"), "eval_prompts": data.get("eval_prompts")},
        max_tokens=data.get("max_prompt_tokens", 0),
        columns=data.get("columns") or {},
        eval_share=data.get("eval_share") or 0.0,
        seed=settings.get("seed_everything", 0),
    )
    return {prompt.id: prompt for prompt in sets.read("eval_prompts")}


def _instantiated(settings: Any, source: str) -> Reward:
    lost = next(masked_keys(settings, "data.reward"), None)
    if lost is not None:
        raise UserError(
            f"{lost} is masked in the config.yaml of {source}, so that its reward cannot be loaded again"
        )
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--reward", type=Reward)
    try:
        reward: Reward = parser.instantiate(parser.parse_object({"reward": settings})).reward
    except (ArgumentError, ValueError, ImportError) as error:
        raise UserError(
            f"data.reward of {source} cannot be loaded ({' '.join(str(error).split())}): give the command in the "
            "folder that the run was started in"
        ) from error
    return reward
