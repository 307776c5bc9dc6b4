"""What a component is, and what manifests said of one before they had a format number."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from inspect import isabstract
from pathlib import Path
from typing import Any

import pytest
from support.old_run.components import components
from torchmetrics.text import BLEUScore

from sppo_lightning import generation, pairing, rewards, selection
from sppo_lightning.redaction import MASK
from sppo_lightning.rewards import (
    CombinedReward,
    FunctionReward,
    LengthPenalty,
    OpenAIJudge,
    PairwiseReward,
    Reward,
)
from sppo_lightning.store.identity import identity, parameters
from sppo_lightning.store.legacy import legacy_description
from sppo_lightning.types import Prompt

RECORDED = Path(__file__).parents[1] / "support" / "old_run" / "descriptions.json"


class Mode(Enum):
    LOUD = 1


@dataclass
class Component:
    """Something that a config names."""

    number: float
    names: tuple[str, ...]
    function: Callable[..., Any]
    place: Path
    mode: Mode
    part: object
    tags: frozenset[str] = frozenset()


class Stateful(Reward):
    """A user's reward that holds more than it was given."""

    made = 0

    def __init__(self, bonus: float, hidden: int = 0, lost: str = "", batch_size: int = 1) -> None:
        Stateful.made += 1
        self.bonus = bonus
        self._hidden = hidden
        self.batch_size = batch_size
        self.calls = Stateful.made
        self.started = time.time()

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
        self.calls += 1
        return [self.bonus for _ in responses]


def test_identity_golden() -> None:
    part = Stateful(2.0)
    found = identity(
        Component(0.5, ("a", "b"), math.sqrt, Path("a/b"), Mode.LOUD, part, frozenset({"y", "x"}))
    )
    assert found == {
        "class_path": f"{__name__}.Component",
        "init_args": {
            "number": 0.5,
            "names": ["a", "b"],
            "function": "math.sqrt",
            "place": "a/b",
            "mode": "LOUD",
            "part": {"class_path": f"{__name__}.Stateful", "init_args": {"bonus": 2.0}},
            "tags": ["x", "y"],
        },
    }
    assert json.loads(json.dumps(found)) == found


def test_what_an_object_holds_besides_its_arguments_is_no_part_of_it() -> None:
    first = Stateful(1.0, batch_size=4)
    first.score([], [])
    assert identity(first) == identity(Stateful(1.0, lost="kept nowhere"))
    assert identity(first) != identity(Stateful(2.0))
    assert identity(first) != identity(Stateful(1.0, hidden=1))


@dataclass
class Keyed:
    """A user's component with secrets."""

    api_key: str
    headers: dict[str, str]
    max_tokens: int = 3
    hf_token: str | None = None


def test_secrets_are_masked() -> None:
    """An identity is written into manifests; another key makes no other component."""
    found = identity(Keyed("sk-1", {"Authorization": "Bearer x", "accept": "json"}, 7))
    assert found["init_args"] == {
        "api_key": MASK,
        "headers": {"Authorization": MASK, "accept": "json"},
        "max_tokens": 7,
    }
    assert found == identity(Keyed("sk-2", {"Authorization": "Bearer y", "accept": "json"}, 7))


def test_speed_and_place_are_left_out_at_any_depth() -> None:
    judge = OpenAIJudge("http://localhost:1/v1", "judge", max_concurrency=3)
    inner = LengthPenalty(PairwiseReward(judge, opponents=2), per_character=0.5)
    found = identity(CombinedReward({"a": inner, "b": FunctionReward(len)}, {"a": 1.0, "b": 2.0}))
    text = json.dumps(found)
    assert "localhost" not in text
    assert "max_concurrency" not in text
    assert found["init_args"]["weights"] == {"a": 1.0, "b": 2.0}
    penalty = found["init_args"]["rewards"]["a"]
    assert penalty["class_path"] == "sppo_lightning.rewards.LengthPenalty"
    assert penalty["init_args"]["per_character"] == 0.5
    assert penalty["init_args"]["reward"]["init_args"]["judge"]["init_args"]["model"] == "judge"
    assert found["init_args"]["rewards"]["b"]["init_args"]["function"] == "builtins.len"


def test_an_argument_of_another_packages_class_counts() -> None:
    """Older manifests took all metrics of a class for the same."""
    first, second = (rewards.TorchmetricsReward(BLEUScore(n_gram=n)) for n in (2, 3))
    assert identity(first) != identity(second)
    metric = identity(first)["init_args"]["metric"]
    assert metric["class_path"] == "torchmetrics.text.BLEUScore"
    assert metric["init_args"]["n_gram"] == 2
    assert legacy_description(first) == legacy_description(second)


def test_arguments_that_are_handed_on_to_a_base_class_count() -> None:
    generator = generation.AutoGenerator(
        cuda_graphs=False, max_new_tokens=8, temperature=1.0, top_k=3, batch_size=2
    )
    assert identity(generator) == {
        "class_path": "sppo_lightning.generation.AutoGenerator",
        "init_args": {"max_new_tokens": 8, "temperature": 1.0, "top_k": 3, "cuda_graphs": False},
    }


@pytest.mark.parametrize("package", [generation, pairing, rewards, selection])
def test_no_shipped_component_loses_an_argument(package: Any) -> None:
    """Each keeps what it was given under its name, unless that decides speed or place only."""
    made: dict[type, object] = {type(component): component for component in components().values()}
    for component in list(made.values()):
        made |= {type(part): part for part in vars(component).values() if hasattr(part, "free_settings")}
    made |= {
        kind: kind(0.5)
        for kind in vars(selection).values()
        if isinstance(kind, type) and set(parameters(kind)) == {"fraction"} and not isabstract(kind)
    }
    easiest, subset = selection.Easiest(0.5), selection.RandomSubset(0.5)
    for rule in (
        selection.AdaptiveTarget(0.5, start=1.0, step=0.5, target_reward=0.5),
        selection.AllOf([easiest]),
        selection.Band(0.1, 0.5),
        selection.CategoryBandit(0.5),
        selection.DifficultyPools(),
        selection.HighestLearnability(0.5, threshold=0.0),
        selection.MatchedRandom(easiest),
        selection.MatchedRandomSubset(subset),
        selection.PerCategory(easiest),
        selection.RIP(0.5, 0.5, 0.5),
        selection.RIPThresholds(0.0, 1, 1.0),
        selection.RewardBand(0.5, 0.1),
        selection.SkipTied(),
        pairing.BestMinimumOf(2),
        pairing.BestNearest(),
        pairing.LengthPenalizedBestWorst(0.1),
        pairing.MarginThreshold(pairing.BestWorst()),
        pairing.MatchedRandomPairs(pairing.BestWorst()),
        pairing.RandomPairs(2),
        pairing.TopPairs(2),
    ):
        made[type(rule)] = rule
    made[generation.VLLMAdapter] = generation.VLLMAdapter("folder", adapter="a")
    own = {
        kind: component for kind, component in made.items() if kind.__module__.startswith(package.__name__)
    }
    assert len(own) > 4
    for kind, component in own.items():
        kept = set(parameters(kind)) - getattr(kind, "free_settings", set())
        assert [name for name in kept if not hasattr(component, name)] == [], kind


@pytest.mark.parametrize("name", components())
def test_legacy_descriptions(name: str) -> None:
    """To the letter and in its order, since digests were taken of them: see support/old_run/record.py."""
    recorded = json.loads(RECORDED.read_text())
    assert json.dumps(legacy_description(components()[name])) == json.dumps(recorded[name])
