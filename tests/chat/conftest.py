"""Policies to talk to: tiny models, and folders of runs that never ran."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from sppo_lightning.chat.choices import choose
from sppo_lightning.chat.policies import ChatPolicy, PolicyShelf

CPU = torch.device("cpu")
RunMaker = Callable[..., Path]


@pytest.fixture
def make_run(tiny_policy: Path, tmp_path: Path) -> RunMaker:
    """Make a run's folder with the policies of some iterations: whole models, or adapters on the tiny policy."""

    def make(name: str, *iterations: int, lora: bool = False, **policy: Any) -> Path:
        root = tmp_path / name
        settings: dict[str, Any] = {"pretrained": str(tiny_policy), **policy}
        if lora:
            settings["lora"] = {"rank": 2, "alpha": 4}
        generator = {"class_path": "sppo_lightning.generation.HFGenerator", "init_args": {"temperature": 0.7}}
        config = {
            "seed_everything": 1,
            "trainer": {"precision": "32-true"},
            "model": {"policy": settings},
            "data": {"generator": generator, "iterations": 3, "prompts": "train.jsonl"},
        }
        root.mkdir()
        (root / "config.yaml").write_text(yaml.safe_dump(config))
        for number in iterations:
            write_policy(root / f"policies/{number:03d}", tiny_policy, number, lora=lora)
        if iterations:
            shutil.copytree(root / f"policies/{iterations[-1]:03d}", root / "policy")
        return root

    return make


def write_policy(folder: Path, base: Path, number: int, *, lora: bool) -> None:
    """Write what training could have made of the base."""
    torch.manual_seed(number)
    model: Any = AutoModelForCausalLM.from_pretrained(base)
    if lora:
        model = get_peft_model(model, LoraConfig(r=2, lora_alpha=4, target_modules="all-linear"))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    model.save_pretrained(folder)
    for path in base.glob("*token*"):
        shutil.copy(path, folder)
    shutil.copy(base / "chat_template.jinja", folder)
    (folder / "run.json").write_text(json.dumps({"iteration": number}))


@pytest.fixture
def shelf() -> PolicyShelf:
    """Nothing is loaded yet."""
    return PolicyShelf(CPU)


@pytest.fixture
def policy(shelf: PolicyShelf, tiny_policy: Path) -> ChatPolicy:
    """The tiny policy."""
    return shelf.load(choose(str(tiny_policy), device=CPU))
