"""Record what TRL's DPOTrainer makes of ``pairs.py``, as ``trl_dpo.json``.

TRL is no dependency of the project. To record again, in an environment of its own::

    python3 -m venv trlvenv
    trlvenv/bin/pip install torch==2.13.0
    trlvenv/bin/pip install trl==1.16.0 transformers==5.23.0 peft==0.21.2 datasets==5.2.0 accelerate==1.15.0
    HF_HUB_OFFLINE=1 PYTHONPATH=tests trlvenv/bin/python -m golden.record_trl

Everything is computed by TRL, in float32 on the CPU, with a live reference model:

- ``logps``: ``DPOTrainer.compute_ref_log_probs`` on one padded batch of all pairs, for policy and reference;
- ``pairs`` and ``step``: ``DPOTrainer.compute_loss`` and the metrics that it logs, on every pair alone and on
  one batch of all pairs; gradients are those of its return value;
- ``last_step``: the same on the last two pairs;
- ``trained``: what ``DPOTrainer.train`` logs in one optimizer step at rate 0, by micro-batch size.

Two things are not taken from TRL as they are:

- Token ids are given to it, not text: it appends an end token to every plain-text response that lacks one, so
  also to one that was cut. The script checks that its data loader yields exactly the ids of ``pairs.py``.
- Its ``sigmoid`` loss ignores ``label_smoothing``. Conservative DPO is its ``aot`` loss on batches of one
  pair: that loss sorts the log-ratios of a batch first, and there is nothing to sort. So ``step`` is then a
  mean over single pairs.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from support.golden import pairs as golden
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer

OUT = Path(__file__).with_name("trl_dpo.json")
SETTINGS = [(beta, smoothing) for beta in (0.1, 0.5) for smoothing in (0.0, 0.1)]
NAMES = {
    "rewards/chosen": "rewards/chosen",
    "rewards/rejected": "rewards/rejected",
    "rewards/margins": "rewards/margin",
    "rewards/accuracies": "rewards/accuracy",
    "logps/chosen": "logps/chosen",
    "logps/rejected": "logps/rejected",
}
PARAMETERS = (
    "model.embed_tokens.weight",
    "model.layers.0.self_attn.q_proj.weight",
    "model.layers.1.mlp.down_proj.weight",
    "model.norm.weight",
    "lm_head.weight",
)


class TokenIdsDPOTrainer(DPOTrainer):
    """TRL's trainer on token ids: nothing is tokenised, no end token is added."""

    def _prepare_dataset(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
        return dataset


def dataset() -> Dataset:
    return Dataset.from_list(
        [
            {
                "prompt_ids": list(pair.prompt),
                "chosen_ids": list(pair.chosen),
                "rejected_ids": list(pair.rejected),
            }
            for pair in golden.PAIRS
        ]
    )


def tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer that only lends its end and pad token."""
    names = {f"<{number}>": number for number in range(golden.VOCABULARY)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(names, unk_token="<0>")),
        eos_token=f"<{golden.EOS}>",
        pad_token=f"<{golden.PAD}>",
    )


def make_trainer(folder: str, *, beta: float, label_smoothing: float, batch_size: int) -> TokenIdsDPOTrainer:
    return TokenIdsDPOTrainer(
        model=golden.policy(),
        ref_model=golden.reference(),
        args=DPOConfig(
            output_dir=folder,
            loss_type="aot" if label_smoothing else "sigmoid",
            beta=beta,
            label_smoothing=label_smoothing,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=len(golden.PAIRS) // batch_size,
            gradient_checkpointing=False,
            learning_rate=0.0,
            weight_decay=0.0,
            max_grad_norm=1e9,  # so that the norm is logged, and nothing clipped
            max_steps=1,
            max_length=None,
            bf16=False,
            use_cpu=True,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=dataset(),
        processing_class=tokenizer(),
    )


def check_token_ids(trainer: DPOTrainer, batch_size: int) -> None:
    """Assert that the trainer's own data loader yields the pairs' token ids, padded on the right."""
    seen = []
    for batch in trainer.get_train_dataloader():
        rows = [
            (
                tuple(ids[(mask == 1) & (response == 0)].tolist()),
                tuple(ids[response == 1].tolist()),
            )
            for ids, mask, response in zip(
                batch["input_ids"], batch["attention_mask"], batch["completion_mask"], strict=True
            )
        ]
        for (prompt, chosen), (other, rejected) in zip(
            rows[: len(rows) // 2], rows[len(rows) // 2 :], strict=True
        ):
            assert prompt == other
            seen.append(golden.Pair(prompt, chosen, rejected))
    assert sorted(seen) == sorted(golden.PAIRS), f"batch size {batch_size}: {seen}"


def measure(trainer: DPOTrainer, batches: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Return loss, logged metrics and gradients of ``compute_loss``, as means over equal batches."""
    model = trainer.model.train()
    model.zero_grad()
    trainer._metrics["train"].clear()
    rows = dataset().to_list()
    losses = []
    for batch in batches:
        loss = trainer.compute_loss(model, trainer.data_collator([rows[number] for number in batch]))
        (loss / len(batches)).backward()
        losses.append(float(loss.detach()))
    logged = {name: sum(trainer._metrics["train"][key]) / len(batches) for key, name in NAMES.items()}
    gradient = golden.gradient_summary(model)
    return {
        "loss": sum(losses) / len(losses),
        **logged,
        "gradient": {name: gradient[name] for name in ("norm", "along", *PARAMETERS)},
    }


def sequence_logps(trainer: DPOTrainer, model: torch.nn.Module) -> dict[str, list[float]]:
    batch = trainer.data_collator(dataset().to_list())
    chosen, rejected = trainer.compute_ref_log_probs(model, batch)
    return {"chosen": chosen.tolist(), "rejected": rejected.tolist()}


def train(folder: str, *, beta: float, label_smoothing: float, batch_size: int) -> dict[str, float]:
    trainer = make_trainer(folder, beta=beta, label_smoothing=label_smoothing, batch_size=batch_size)
    check_token_ids(trainer, batch_size)
    trainer.train()
    logged = next(entry for entry in trainer.state.log_history if "grad_norm" in entry)
    return {
        "loss": logged["loss"],
        **{name: logged[key] for key, name in NAMES.items()},
        "gradient": {"norm": logged["grad_norm"]},
    }


def record(folder: str, *, beta: float, label_smoothing: float) -> dict[str, Any]:
    count = len(golden.PAIRS)
    trainer = make_trainer(folder, beta=beta, label_smoothing=label_smoothing, batch_size=1)

    def batches(numbers: Sequence[int]) -> list[list[int]]:
        return [[number] for number in numbers] if label_smoothing else [list(numbers)]

    alone = [measure(trainer, [[number]]) for number in range(count)]
    return {
        "beta": beta,
        "label_smoothing": label_smoothing,
        "trl_loss_type": trainer.loss_types[0],
        "pairs": {name: [pair[name] for pair in alone] for name in ("loss", *list(NAMES.values())[:4])},
        "step": measure(trainer, batches(range(count))),
        "last_step": measure(trainer, batches(range(count - 2, count))),
        "trained": {
            str(size): train(folder, beta=beta, label_smoothing=label_smoothing, batch_size=size)
            for size in ((1,) if label_smoothing else (1, 2, 3, 6))
        },
    }


def main() -> None:
    torch.use_deterministic_algorithms(True)
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(folder, beta=0.1, label_smoothing=0.0, batch_size=1)
        recorded = {
            "versions": {name: version(name) for name in ("trl", "transformers", "torch", "accelerate")},
            "dtype": str(next(trainer.model.parameters()).dtype).removeprefix("torch."),
            "logps": {
                "policy": sequence_logps(trainer, trainer.model),
                "reference": sequence_logps(trainer, trainer.ref_model),
            },
            "settings": [
                record(folder, beta=beta, label_smoothing=smoothing) for beta, smoothing in SETTINGS
            ],
        }
    OUT.write_text(json.dumps(recorded, indent=1) + "\n")
    print(f"{OUT.name}: {OUT.stat().st_size} bytes")


if __name__ == "__main__":
    main()
