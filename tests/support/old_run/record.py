"""Made the run folders here: what commit a42d472, before version 0.1.0 was released, leaves of a tiny run.

To make them again, in a checkout of this repository, with the path of one of that commit:

    PYTHONPATH=CHECKOUT_OF_A42D472 python tests/support/old_run/record.py

``finished/`` is a run of three iterations on one CPU, with the answers to ``test.jsonl``. ``killed/`` is the same run
until the middle of iteration 1, one optimizer step after its last checkpoint: resumed, it must become ``finished/``.
All paths are relative to the folder that this script stands in, which is the working directory of each command.
``descriptions.json`` holds what it said of generators and rewards in manifests, in its order.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
CHECKPOINTS = 7  # that the killed run has written, two of them in iteration 1


def describe_components() -> None:
    """Write what manifests said of each shipped generator and reward."""
    sys.path.append(str(HERE.parents[1]))
    from support.old_run.components import components

    from sppo_lightning.rollouts import describe  # where that commit has it

    found = {name: describe(component) for name, component in components().items()}
    (HERE / "descriptions.json").write_text(json.dumps(found, indent=1) + "\n")


def make_models() -> None:
    """Write the random policy and the random reward model."""
    import torch
    from transformers import LlamaForCausalLM, LlamaForSequenceClassification

    sys.path.append(str(HERE.parents[1]))
    from support.models import byte_tokenizer, tiny_config

    size = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "tie_word_embeddings": True}
    for seed, name, kind in (
        (0, "policy", LlamaForCausalLM),
        (1, "reward", LlamaForSequenceClassification),
    ):
        torch.manual_seed(seed)
        kind(tiny_config(**size, num_labels=1)).save_pretrained(HERE / name)
        byte_tokenizer().save_pretrained(HERE / name)


def make_prompts() -> None:
    """Write the prompts of training, evaluation, test and prediction."""
    for name, start, count in (("train", 0, 10), ("eval", 50, 4), ("test", 70, 3), ("predict", 90, 2)):
        records = [
            {"id": f"{name}{number}", "prompt": f"Count to {start + number}", "answer": str(start + number)}
            for number in range(count)
        ]
        (HERE / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def run(*arguments: str, checkpoints: int | None = None) -> None:
    """Give a command, in a process that is killed before it writes another checkpoint than so many."""
    child = os.fork()
    if child == 0:
        import torch

        from sppo_lightning.__main__ import main

        written = 0

        def count(event: str, found: tuple[Any, ...]) -> None:
            nonlocal written
            if event == "os.rename" and os.fspath(found[1]).endswith("last.ckpt"):
                if written == checkpoints:
                    os.kill(os.getpid(), signal.SIGKILL)
                written += 1

        sys.addaudithook(count)
        torch.set_num_threads(1)
        main([*arguments])
        os._exit(0)
    _, status = os.waitpid(child, 0)
    expected = 0 if checkpoints is None else -signal.SIGKILL
    assert os.waitstatus_to_exitcode(status) == expected, arguments


def record() -> None:
    """Make all of it."""
    os.chdir(HERE)
    os.environ |= {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    for name in ("policy", "reward", "finished", "killed"):
        shutil.rmtree(name, ignore_errors=True)
    make_models()
    make_prompts()
    describe_components()
    finished, killed = (
        ("--config=config.yaml", f"--trainer.default_root_dir={n}") for n in ("finished", "killed")
    )
    run("fit", *finished)
    run("test", *finished, "--ckpt_path=finished/checkpoints/last.ckpt")
    run("fit", *killed, checkpoints=CHECKPOINTS)
    for leftover in [*HERE.rglob(".lock"), *HERE.rglob(".*.tmp")]:  # they name processes of this machine
        leftover.unlink()


if __name__ == "__main__":
    record()
