"""Read files of ``predict --format`` and of ``judge`` by the code of the projects that they are for.

In an environment of its own, without torch, with a checkout of Arena-Hard (lmarena/arena-hard-auto)::

    python -m venv judges
    judges/bin/pip install alpaca-eval==0.6.6 && judges/bin/pip install --no-deps fschat==0.2.36
    judges/bin/python benchmarks/judge_readers.py --arena-hard arena-hard-auto \
        --alpaca-file runs/mine/predictions-alpaca_eval.json --prompts alpaca_eval.json \
        --arena-file runs/mine/predictions-arena_hard.jsonl --mt-bench-file runs/mine/predictions-mt_bench.jsonl \
        --judgements runs/mine/judgements/…

Arena-Hard's and FastChat's modules import clients of many services; their functions are taken from the files as they
stand there, alone. AlpacaEval looks prompts' difficulties up even where its model does not read them, in a file of the
hub; it gets one with zeros.
"""

from __future__ import annotations

import argparse
import ast
import glob
import json
import os
import re
import shutil
import tempfile
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pandas as pd
from alpaca_eval import metrics, utils
from alpaca_eval.metrics import glm_winrate


def functions(file: Path, *names: str) -> list[Any]:
    """Return functions of a module without importing it."""
    tree = ast.parse(file.read_text())
    wanted = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in names]
    space: dict[str, Any] = {"os": os, "json": json, "re": re, "glob": glob, "pd": pd}
    if any(isinstance(node, ast.ImportFrom) and node.module == "glob" for node in tree.body):
        space["glob"] = glob.glob
    exec(compile(ast.Module(body=wanted, type_ignores=[]), str(file), "exec"), space)
    return [space[name] for name in names]


def loaded(loader: Any, file: Path) -> dict[Any, dict[str, Any]]:
    """Return a file's answers by question, as a loader of a folder of models gives them."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(file, Path(folder) / "mine.jsonl")
        answers: dict[Any, dict[str, Any]] = loader(folder)["mine"]
    return answers


def check_alpaca(file: Path, prompts: Path) -> None:
    """Require AlpacaEval's columns, and its prompts in its order."""
    found, wanted = (utils.load_or_convert_to_dataframe(path) for path in (file, prompts))
    assert list(found["instruction"]) == list(wanted["instruction"]), "other prompts, or another order"
    assert set(found.columns) <= {"instruction", "output", "generator", "dataset"}, found.columns
    name = utils.get_generator_name(None, found)
    print(f"AlpacaEval: {len(found)} rows of {name}, {(found['output'] == '').sum()} empty")


def check_arena(file: Path, checkout: Path) -> None:
    """Require what Arena-Hard's judge and its style control read, and its own counts."""
    (load,) = functions(checkout / "utils/completion.py", "load_model_answers")
    count, remove = functions(
        checkout / "utils/add_markdown_info.py", "count_markdown_elements", "remove_pattern"
    )
    answers = loaded(load, file)
    for answer in answers.values():
        text = answer["messages"][-1]["content"]["answer"]
        own = count(remove(text, re.compile("```([^`]*)```")), suffix="")
        assert {name: value for name, value in answer["metadata"].items() if name != "token_len"} == own, own
        features = [
            value if isinstance(value, int) else sum(value.values()) for value in answer["metadata"].values()
        ]
        assert next(iter(answer["metadata"])) == "token_len", (
            "style control takes the first feature as the length"
        )
        assert features[0] > 0
    print(
        f"Arena-Hard: {len(answers)} answers of {next(iter(answers.values()))['model']}, counts are its own"
    )


def check_mt_bench(file: Path) -> None:
    """Require two turns of each question, as FastChat's judge reads them."""
    spec = find_spec("fastchat")
    assert spec is not None
    assert spec.submodule_search_locations
    (load,) = functions(
        Path(spec.submodule_search_locations[0]) / "llm_judge/common.py", "load_model_answers"
    )
    answers = loaded(load, file)
    for question, answer in answers.items():
        first, second = (answer["choices"][0]["turns"][turn] for turn in (0, 1))
        assert answer["question_id"] == question
        assert isinstance(first, str)
        assert isinstance(second, str)
    print(f"MT-Bench: {len(answers)} two-turn answers of {next(iter(answers.values()))['model_id']}")


def check_judgements(folder: Path) -> None:
    """Require that AlpacaEval computes the figures of ``results.json`` from ``annotations.json``."""
    annotations = pd.read_json(folder / "annotations.json")
    results = json.loads((folder / "results.json").read_text())
    with tempfile.TemporaryDirectory() as place:
        zeros = Path(place) / "df_gamed.csv"
        pd.DataFrame({"index": range(len(annotations)), "model": "", "instruction_difficulty": 0.0}).to_csv(
            zeros, index=False
        )
        glm_winrate.hf_hub_download = lambda **_: str(zeros)
        found = metrics.get_length_controlled_winrate(
            annotations, glm_name="length_controlled_minimal", save_weights_dir=None
        )
    pairs = {
        "win_rate": results["win_rate"]["rate"],
        "length_controlled_winrate": results["length_controlled"]["rate"],
    }
    for name, ours in pairs.items():
        print(f"AlpacaEval: {name} {found[name]:.10f}, in results.json {100 * ours:.10f}")
        assert abs(found[name] - 100 * ours) < 1e-9
    assert found["n_total"] == results["prompts"] - results["win_rate"]["unknown"]


def main() -> None:
    """Check the files that are named."""
    warnings.filterwarnings("ignore")
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in ("alpaca-file", "prompts", "arena-file", "arena-hard", "mt-bench-file", "judgements"):
        parser.add_argument(f"--{name}", type=Path)
    given = parser.parse_args()
    if given.alpaca_file:
        check_alpaca(given.alpaca_file, given.prompts)
    if given.arena_file:
        check_arena(given.arena_file, given.arena_hard)
    if given.mt_bench_file:
        check_mt_bench(given.mt_bench_file)
    if given.judgements:
        check_judgements(given.judgements)


if __name__ == "__main__":
    main()
