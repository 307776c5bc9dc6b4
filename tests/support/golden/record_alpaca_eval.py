"""Record what AlpacaEval's length-controlled win rate makes of fixed annotations, as ``alpaca_eval.json``.

AlpacaEval is no dependency of the project. In an environment of its own, without torch::

    python -m venv alpacavenv && alpacavenv/bin/pip install alpaca-eval==0.6.6
    PYTHONPATH=tests alpacavenv/bin/python -m support.golden.record_alpaca_eval

``alpaca_eval.metrics.get_length_controlled_winrate`` computes every value, for its three models. It downloads its
``df_gamed.csv``; here that is the synthetic file of a case, which stands in the record as text. Texts matter by their
length only, so the record holds lengths.
"""

from __future__ import annotations

import json
import tempfile
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from alpaca_eval import metrics
from alpaca_eval.metrics import glm_winrate

OUT = Path(__file__).with_name("alpaca_eval.json")
MODELS = ("length_controlled_v1", "length_controlled_minimal")


def case(seed: int, prompts: int, *, kind: str) -> dict[str, Any]:
    """Return made-up annotations in which longer answers win more often, and a made-up ``df_gamed.csv``."""
    rng = np.random.default_rng(seed)
    lengths, others = (rng.integers(20, 2000, prompts) for _ in range(2))
    difficulties = rng.normal(size=prompts)
    chance = 1 / (1 + np.exp(-(1.5 * np.tanh((lengths - others) / 800) - 0.7 * difficulties + 0.3)))
    if kind == "soft":
        preferences = np.clip(chance + rng.normal(scale=0.2, size=prompts), 0, 1)
    else:
        preferences = (rng.uniform(size=prompts) < chance).astype(float)
        preferences[rng.uniform(size=prompts) < 0.1] = 0.5
    wanted: list[float | None] = [round(float(value), 6) for value in preferences]
    if kind == "missing":
        wanted[3] = wanted[17] = None
    gamed = pd.DataFrame(
        {
            "index": list(range(prompts)) * 2,
            "model": ["longer"] * prompts + ["shorter"] * prompts,
            "preference": np.round(np.clip(rng.normal(0.55, 0.2, 2 * prompts), 0, 1), 6),
            "std_delta_len": np.round(rng.normal(size=2 * prompts), 6),
            "instruction_difficulty": np.round(np.tile(difficulties, 2), 6),
            "not_gamed_baseline": False,
        }
    )
    return {
        "preferences": wanted,
        "lengths": lengths.tolist(),
        "other_lengths": others.tolist(),
        "df_gamed": gamed.to_csv(index=False),
    }


def recorded(given: dict[str, Any]) -> dict[str, Any]:
    """Return AlpacaEval's figures, in per cent as it gives them."""
    annotations = pd.DataFrame(
        {
            "instruction": [f"prompt {number}" for number in range(len(given["lengths"]))],
            "output_1": ["x" * length for length in given["other_lengths"]],
            "output_2": ["x" * length for length in given["lengths"]],
            "generator_1": "reference",
            "generator_2": "policy",
            "annotator": "judge",
            "preference": [None if value is None else value + 1 for value in given["preferences"]],
        }
    )
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "df_gamed.csv"
        file.write_text(given["df_gamed"])
        glm_winrate.hf_hub_download = lambda **_: str(file)
        for model in MODELS:
            figures = metrics.get_length_controlled_winrate(
                annotations, glm_name=model, save_weights_dir=None, is_add_glm_preference_inplace=False
            )
            found[model] = {name: float(value) for name, value in figures.items()}
    return found


def main() -> None:
    """Write the record."""
    warnings.filterwarnings("ignore")
    cases = {
        "soft preferences": case(1, 60, kind="soft"),
        "verdicts and ties": case(2, 80, kind="verdicts"),
        "preferences that are missing": case(3, 50, kind="missing"),
    }
    versions = {name: version(name) for name in ("alpaca-eval", "scikit-learn", "patsy", "pandas")}
    content = {
        "versions": versions,
        "cases": {name: {**given, "found": recorded(given)} for name, given in cases.items()},
    }
    OUT.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
