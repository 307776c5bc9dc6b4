"""The model card of an exported policy."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from transformers import AutoModelForCausalLM

from sppo_lightning import __version__
from sppo_lightning.export import Exporter, HFModel, MergedModel, PEFTAdapter
from sppo_lightning.export.card import component, model_card, model_name, settings
from sppo_lightning.export.check import Check, Distance
from sppo_lightning.export.finished_run import FinishedRun, open_run
from sppo_lightning.store.iterations import IterationStore
from sppo_lightning.store.shards import write_rollouts
from sppo_lightning.types import Rollout

PASSED = Distance("the export and the trained policy", 3e-6, 1e-4, "0.0001 for float32 arithmetic")
CHECK = Check([], [PASSED])
LORA = {"rank": 32, "alpha": 64.0, "target_modules": "all-linear"}
CONFIG: dict[str, Any] = {
    "seed_everything": 7,
    "trainer": {"precision": "bf16-mixed"},
    "model": {
        "policy": {"pretrained": "meta/Some-8B"},
        "loss": {"class_path": "sppo_lightning.losses.DPOLoss", "init_args": {"beta": 0.1}},
        "reference": "initial",
        "learning_rate": 5e-7,
    },
    "data": {
        "prompts": ["/home/me/secret-project/train.jsonl", "org/prompts"],
        "iterations": 3,
        "samples_per_prompt": 5,
        "selection": {"class_path": "sppo_lightning.selection.Easiest", "init_args": {"fraction": 0.3}},
        "generator": {
            "class_path": "sppo_lightning.generation.OpenAIServerGenerator",
            "init_args": {
                "base_url": "http://10.0.0.7:8000/v1",
                "api_key_env": "MY_KEY",
                "weight_sync": {"class_path": "x.VLLMAdapter", "init_args": {"folder": "/shared/run1"}},
                "max_new_tokens": 256,
                "temperature": 0.8,
            },
        },
        "reward": {
            "class_path": "sppo_lightning.rewards.CombinedReward",
            "init_args": {
                "rewards": {
                    "model": {
                        "class_path": "sppo_lightning.rewards.SequenceClassificationReward",
                        "init_args": {"pretrained": "/home/me/models/reward-v2", "max_tokens": None},
                    },
                    "server": {
                        "class_path": "sppo_lightning.rewards.ServerReward",
                        "init_args": {
                            "base_url": "https://user:pass@inside.example/score",
                            "format": {"class_path": "x.JSONRewards", "init_args": {"path": "rewards"}},
                        },
                    },
                },
                "weights": {"model": 1.0, "server": 2.0},
            },
        },
        "pairs_per_step": 32,
    },
}


def finished(root: Path, **policy: Any) -> FinishedRun:
    """A run folder as far as a card reads it: two finished iterations, and their evaluations."""
    config = json.loads(json.dumps(CONFIG))
    config["model"]["policy"].update(policy)
    (root / "config.yaml").write_text(yaml.safe_dump(config))
    (root / "policy").mkdir()
    settings = {"r": 32, "use_dora": bool((policy.get("lora") or {}).get("dora"))}
    (root / "policy/adapter_config.json").write_text(json.dumps(settings))
    for number in (0, 1):
        IterationStore(root / f"iterations/{number:03d}").write_manifest({"complete": True})
    for number, rewards in enumerate([(0.0, 1.0), (1.0, 1.0), (2.0, 3.0), (9.0, 9.0)]):
        rows = [Rollout(f"p{n}", 0, "q", "a", (3, 1), "stop", reward) for n, reward in enumerate(rewards)]
        write_rollouts(root / f"evaluations/{number:03d}/rollouts.parquet", rows)
    return open_run(root)


def card(source: FinishedRun, exporter: Exporter | None = None, check: Check | None = CHECK) -> str:
    policy: Any = SimpleNamespace(run=source, loader=AutoModelForCausalLM)  # no model is read for a card
    return model_card(exporter or HFModel(), policy, check)


def front_matter(text: str) -> dict[str, Any]:
    assert text.startswith("---\n")
    found: dict[str, Any] = yaml.safe_load(text.split("---\n")[1])
    return found


@pytest.mark.parametrize(
    ("exporter", "policy", "library", "tag"),
    [(HFModel(), {}, "transformers", "dpo"), (PEFTAdapter(), {"lora": LORA}, "peft", "lora")],
)
def test_front_matter(tmp_path: Path, exporter: Exporter, policy: Any, library: str, tag: str) -> None:
    front = front_matter(card(finished(tmp_path, **policy), exporter))
    assert front["base_model"] == "meta/Some-8B"
    assert front["library_name"] == library
    assert front["pipeline_tag"] == "text-generation"
    assert {"sppo-lightning", "preference-optimization", tag} <= set(front["tags"])


def test_quantised_runs_are_tagged(tmp_path: Path) -> None:
    front = front_matter(card(finished(tmp_path, lora=LORA, quantization="nf4"), PEFTAdapter()))
    assert "qlora" in front["tags"]


def test_results_are_the_evaluations_up_to_the_iteration(tmp_path: Path) -> None:
    """Rewards 0, 1 / 1, 1 / 2, 3: mean gains 0.5 ± 0.5 and 2 ± 0; half a tie and a win = 75 %, two wins = 100 %."""
    text = card(finished(tmp_path))
    assert "| initial policy | 0.500 ± 0.500 |  |  | 2.0 |" in text
    assert "| 1 iteration(s) | 1.000 ± 0.000 | +0.500 ± 0.500 | 75.0% | 2.0 |" in text
    assert "| 2 iteration(s) | 2.500 ± 0.500 | +2.000 ± 0.000 | 100.0% | 2.0 |" in text
    assert "3 iteration(s)" not in text


def test_a_run_without_evaluations_has_no_results(tmp_path: Path) -> None:
    source = finished(tmp_path)
    (tmp_path / "evaluations/000/rollouts.parquet").unlink()
    assert "## Results" not in card(source)


def test_settings_that_matter(tmp_path: Path) -> None:
    found = dict(settings(finished(tmp_path, lora={**LORA, "rslora": True}, quantization="nf4")))
    assert found["trained"] == (
        "LoRA adapter: rank 32, alpha 64, scaled by alpha / sqrt(rank), dropout 0, on all-linear"
    )
    assert found["base held in"] == "nf4"
    assert found["iterations"] == "2 of 3"
    assert found["loss"] == "DPOLoss(beta=0.1)"
    assert found["reference"] == "the policy that the run started from"
    assert found["learning rate"] == "5e-07"
    assert found["selection"] == "Easiest(fraction=0.3)"
    assert found["generator"] == "OpenAIServerGenerator(max_new_tokens=256, temperature=0.8)"
    assert found["seed"] == "7"


def test_a_fixed_number_of_steps_takes_the_place_of_epochs(tmp_path: Path) -> None:
    source = finished(tmp_path)
    assert dict(settings(source))["epochs in each"] == "1"
    source.config["data"]["steps_per_iteration"] = 12
    found = dict(settings(source))
    assert found["optimizer steps in each"] == "12"
    assert "epochs in each" not in found


def test_an_unquantised_base_says_its_dtype(tmp_path: Path) -> None:
    assert dict(settings(finished(tmp_path, lora=LORA)))["base held in"] == "bfloat16"


def test_nothing_of_the_machine_is_on_the_card(tmp_path: Path) -> None:
    source = finished(tmp_path, pretrained="/home/me/models/base-1b", lora=LORA)
    text = card(source, PEFTAdapter())
    for private in ("/home", "secret-project", "10.0.0.7", "inside.example", "pass", "MY_KEY", "/shared"):
        assert private not in text.replace("passed", ""), private
    assert str(tmp_path) not in text
    assert "train.jsonl, org/prompts" in text
    assert "pretrained=reward-v2" in text
    assert front_matter(text)["base_model"] == "base-1b"


@pytest.mark.parametrize(
    ("location", "name"),
    [
        ("org/model", "org/model"),
        ("model", "model"),
        ("/data/models/llama", "llama"),
        ("./models/llama/", "llama"),
        ("models/of/mine", "mine"),
        ("/data/llama.Q4_K_M.gguf", "llama.Q4_K_M.gguf"),
        ("C:\\models\\llama", "llama"),
        ("/c/hub/models--org--llama/snapshots/0a1b2c", "org/llama"),
        ("https://host/x", "(an address)"),
        (".", "."),  # a stop string, say
        ("/", "/"),
    ],
)
def test_names_of_models(location: str, name: str) -> None:
    assert model_name(location) == name


def test_a_relative_folder_that_is_there_is_no_hub_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models/llama").mkdir(parents=True)
    assert model_name("models/llama") == "llama"


def test_the_values_of_a_users_class_are_left_out() -> None:
    """Nobody here knows which of them are private; our own components inside it are shown."""
    inner = {
        "class_path": "sppo_lightning.rewards.LengthPenalty",
        "init_args": {"per_character": 0.5, "max_tokens": 9},
    }
    own = {
        "class_path": "mine.Reward",
        "init_args": {"house": "villa", "inner": inner, "tags": ["x"], "none": None},
    }
    shown = "Reward(house=…, inner=LengthPenalty(per_character=0.5, max_tokens=9), tags=…)"
    assert component(own) == shown
    assert component({"class_path": "sppo_lightning_of_mine.Reward", "init_args": {"a": 1}}) == "Reward(a=…)"
    around = {
        "class_path": "sppo_lightning.rewards.CombinedReward",
        "init_args": {"rewards": {"a": own}, "token": "x"},
    }
    assert component(around) == f"CombinedReward(rewards={{a: {shown}}}, token=(secret, not stored))"


def test_components_without_arguments() -> None:
    assert component({"class_path": "sppo_lightning.selection.AllPrompts"}) == "AllPrompts()"


def test_tables_hold_whatever_text_comes(tmp_path: Path) -> None:
    source = finished(tmp_path)
    source.config["data"]["generator"]["init_args"]["stop"] = ["a|b", "<script>"]  # type: ignore[index]
    assert "stop=\\[a\\|b, &lt;script>]" in card(source)


def test_how_to_load(tmp_path: Path) -> None:
    source = finished(tmp_path, lora=LORA)
    adapter = card(source, PEFTAdapter())
    assert 'AutoPeftModelForCausalLM.from_pretrained("path/to/this/folder")' in adapter
    assert "vLLM serves it with `--enable-lora --max-lora-rank 32` or more." in adapter
    assert "base_model_name_or_path" not in adapter, "a hub id is found from everywhere"
    assert 'AutoModelForCausalLM.from_pretrained("path/to/this/folder")' in card(source, MergedModel())


def test_an_adapter_on_a_gguf_file(tmp_path: Path) -> None:
    text = card(finished(tmp_path, pretrained="/data/llama.Q4_0.gguf", lora=LORA), PEFTAdapter())
    assert "PEFT cannot open llama.Q4_0.gguf, the base, by itself" in text
    assert 'gguf_file="llama.Q4_0.gguf")' in text
    assert 'PeftModel.from_pretrained(base, "path/to/this/folder")' in text
    assert "/data" not in text


def test_the_check_is_on_the_card(tmp_path: Path) -> None:
    source = finished(tmp_path, lora=LORA)
    broken = Distance("a and b", 0.5, 1e-4, "0.0001 for float32 arithmetic")
    text = card(source, MergedModel(), Check([], [PASSED, broken], weights=3, moved=0.25))
    assert (
        "| the export and the trained policy | 3e-06 | 0.0001: 0.0001 for float32 arithmetic | passed |"
        in text
    )
    assert "| a and b | 0.5 | 0.0001: 0.0001 for float32 arithmetic | FAILED |" in text
    assert "For scale: training moved these log-probs by 0.25." in text
    assert "bit by bit" in text
    altered = Check([], [PASSED], weights=3, altered=["one", "two"])
    assert "FAILED: 2 weights in this folder" in card(source, MergedModel(), altered)
    assert "bit by bit" not in card(source, PEFTAdapter()), "it is copied"


def test_versions(tmp_path: Path) -> None:
    assert f"sppo-lightning {__version__} (transformers " in card(finished(tmp_path))
