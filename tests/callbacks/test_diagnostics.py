"""What an iteration did to the policy: each number against one computed another way, from the files of a whole run."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from support.runs import cli_arguments
from transformers import AutoModelForCausalLM, AutoTokenizer

from sppo_lightning.__main__ import main
from sppo_lightning.callbacks.diagnostics import _name_reward_hacking, distinct_bigrams
from sppo_lightning.evaluation.stored import stored_divergences
from sppo_lightning.store.run_folder import RunFolder
from sppo_lightning.store.shards import write_rollouts
from sppo_lightning.types import Rollout

Read = Callable[[Path], list[dict[str, Any]]]


@pytest.fixture(scope="module")
def run(tiny_policy: Path, counting_prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """Two iterations, the policy after each kept."""
    root = tmp_path_factory.mktemp("diagnostics") / "run"
    keep = '[{"class_path": "sppo_lightning.callbacks.PolicyExport", "init_args": {"keep_every_iteration": true}}]'
    settings = {"data__eval_prompts": counting_prompts / "eval.jsonl", "trainer__callbacks": keep}
    main(["fit", *cli_arguments(tiny_policy, counting_prompts / "train.jsonl", root, **settings)])
    return RunFolder(root)


def rows(path: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = pq.read_table(path, partitioning=None).to_pylist()
    return found


def answers(run: RunFolder, finished: int) -> list[dict[str, Any]]:
    return rows(run.evaluation(f"{finished:03d}") / "rollouts.parquet")


def mean_drop(before: Path, after: Path, answers: list[dict[str, Any]]) -> float:
    """How much less likely a model makes answers than another one, nat a token, mean over answers."""
    tokenizer = AutoTokenizer.from_pretrained(before)
    models = [
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval() for path in (before, after)
    ]
    drops = []
    for row in answers:
        turns = [{"role": "user", "content": row["prompt"]}]
        prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
        ids = torch.tensor([prompt + row["token_ids"]])
        sums = []
        for model in models:
            with torch.no_grad():
                logps = model(ids).logits[0, len(prompt) - 1 : -1].double().log_softmax(-1)
            sums.append(float(logps.gather(1, ids[0, len(prompt) :, None]).sum()))
        drops.append((sums[0] - sums[1]) / len(row["token_ids"]))
    return sum(drops) / len(drops)


def test_divergence_from_initial_policy_and_iteration_start(run: RunFolder, tiny_policy: Path) -> None:
    found = [run.iteration(number).read_diagnostics() for number in range(2)]
    first, second = (run.kept_policy(number) for number in range(2))
    assert found[0]["val/kl/initial"] == found[0]["val/kl/iteration_start"]
    assert found[0]["val/kl/initial"] == pytest.approx(
        mean_drop(tiny_policy, first, answers(run, 0)), abs=1e-5
    )
    assert found[1]["val/kl/initial"] == pytest.approx(
        mean_drop(tiny_policy, second, answers(run, 0)), abs=1e-5
    )
    assert found[1]["val/kl/iteration_start"] == pytest.approx(
        mean_drop(first, second, answers(run, 1)), abs=1e-5
    )
    assert found[1]["val/kl/initial"] != pytest.approx(found[1]["val/kl/iteration_start"])
    for name, earlier in (("initial", "0"), ("iteration_start", "1")):
        of_prompts = stored_divergences(run.evaluation("002"), earlier)
        assert sorted(of_prompts) == [f"eval{n}" for n in range(6)]
        assert sum(of_prompts.values()) / 6 == pytest.approx(found[1][f"val/kl/{name}"])


def test_lengths_and_diversity_of_held_out_answers(run: RunFolder) -> None:
    found, before, after = run.iteration(1).read_diagnostics(), answers(run, 0), answers(run, 2)
    lengths = [sum(len(row["token_ids"]) for row in each) for each in (before, after)]
    assert found["val/response_length/growth"] == pytest.approx(lengths[1] / lengths[0])
    cut = sum(row["finish_reason"] == "length" for row in after)
    assert found["val/response_unfinished/share"] == pytest.approx(cut / len(after))
    bigrams = [tuple(row["token_ids"][n : n + 2]) for row in after for n in range(len(row["token_ids"]) - 1)]
    assert found["val/diversity/distinct_2"] == pytest.approx(len(set(bigrams)) / len(bigrams))


def test_log_ratios_are_means_over_the_steps_of_an_iteration(run: RunFolder) -> None:
    """Each step's mean, weighted by its pairs; they are logged with all others."""
    with run.metrics.open() as file:
        logged = list(csv.DictReader(file))
    steps = [row for row in logged if row["train/logratios/chosen"]]
    pairs = [len(rows(run.iteration(number).pairs_path)) for number in range(2)]
    first = math.ceil(pairs[0] / 4)
    for number, part in enumerate((steps[:first], steps[first:])):
        sizes = [min(4, pairs[number] - 4 * step) for step in range(len(part))]
        found = run.iteration(number).read_diagnostics()
        for side in ("chosen", "rejected", "chosen_fell"):
            values = [float(row[f"train/logratios/{side}"]) for row in part]
            mean = sum(value * size for value, size in zip(values, sizes, strict=True)) / sum(sizes)
            assert found[f"learning/logratios/{side}"] == pytest.approx(mean, abs=1e-6)
    assert [row for row in logged if row["val/kl/initial"]] == [
        row for row in logged if row["learning/logratios/chosen"]
    ]


def test_without_held_out_prompts_training_is_diagnosed(
    tiny_policy: Path, counting_prompts: Path, tmp_path: Path
) -> None:
    main(["fit", *cli_arguments(tiny_policy, counting_prompts / "train.jsonl", tmp_path, data__iterations=1)])
    found = RunFolder(tmp_path).iteration(0).read_diagnostics()
    assert found.keys() == {f"learning/logratios/{name}" for name in ("chosen", "rejected", "chosen_fell")}


def evaluated(folder: RunFolder, finished: int, *rewards: float) -> None:
    written = [Rollout(f"p{n}", 0, "", "", (7,), "stop", reward) for n, reward in enumerate(rewards)]
    write_rollouts(folder.evaluation(f"{finished:03d}") / "rollouts.parquet", written)


@pytest.mark.parametrize(
    ("rewards", "diversity", "said"),
    [
        ((9.0, 9.0, 0.5), 0.9, ["win rate against the initial policy fell from 100.0% to 66.7%"]),
        ((3.0, 2.0, 2.0), 0.5, ["less diverse (distinct bigrams from 0.90 to 0.50)"]),
        ((3.0, 2.0, 2.0), 0.9, []),
        ((9.0, 0.5, 0.5), 0.5, []),  # a rise of 2.1 with a standard error of 2.8 may be chance
        ((1.0, 0.5, 0.5), 0.5, []),  # the reward fell too: the gate's part
    ],
)
def test_a_reward_that_rises_alone_is_named(
    tmp_path: Path,
    rewards: tuple[float, ...],
    diversity: float,
    said: list[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = RunFolder(tmp_path)
    evaluated(folder, 0, 1.0, 1.0, 1.0)
    evaluated(folder, 1, 1.2, 1.2, 1.2)
    evaluated(folder, 2, *rewards)
    with caplog.at_level("INFO"):
        _name_reward_hacking(folder, 1, 2, 0.9, diversity)
    found = [text for text in caplog.messages if "reward hacking" in text]
    assert len(found) == len(said)
    assert all(part in text for part, text in zip(said, found, strict=True))


def test_distinct_bigrams_golden() -> None:
    """Bigrams 12, 21, 12, 34: three of four are distinct; none in a single token."""
    assert (
        distinct_bigrams([Rollout("p", 0, "", "", ids, "stop", 0.0) for ids in ((1, 2, 1, 2), (3, 4), (5,))])
        == 0.75
    )
    assert math.isnan(distinct_bigrams([]))
