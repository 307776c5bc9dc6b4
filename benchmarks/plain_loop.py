"""Train a run's stored pairs again by a loop of plain PyTorch, and compare its log-ratios with the logged ones.

For a run of DPO, all weights trained, reference previous_iteration, AdamW, linear schedule: the quick start with
``--model.loss sppo_lightning.losses.DPOLoss --model.loss.beta 0.1``. Only the order of pairs comes from the package.
Where both agree, what a run learns is what its settings make of its pairs; ``--order-seeds`` takes the same pairs in
other orders, which shows how much of it is chance.

    python benchmarks/plain_loop.py RUN --model .cache/smollm2-135m-instruct --iterations 2 --order-seeds 2 3
"""

from __future__ import annotations

import argparse
import copy
import csv
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from transformers import AutoModelForCausalLM

from sppo_lightning.seeding import distinct, random_keys
from sppo_lightning.store.pairs import PairTable
from sppo_lightning.store.run_folder import RunFolder

WARMUP = 0.1  # the default of schedules.Linear


def logp(model: Any, prompt: Sequence[int], response: Sequence[int]) -> Tensor:
    """Return the response's summed log-prob, nats."""
    ids = torch.tensor([[*prompt, *response]])
    logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].float()
    return logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None]).double().sum()


def rate(step: int, steps: int) -> float:
    """Return the share of the peak rate: linear warm-up, then linear decay."""
    warm = -(-WARMUP * steps // 1)
    return (step + 1) / (warm + 1) if step < warm else 1 - (step - warm) / (steps - warm)


def train(
    model: Any, pairs: PairTable, order: Sequence[int], settings: dict[str, Any], *, bf16: bool
) -> list[tuple[float, float]]:
    """Train the model for an iteration; return the mean log-ratios of each step, chosen and rejected, nats."""
    autocast = torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16)
    rows = list(pairs)
    sides = [
        [(row.prompt_token_ids, row.chosen_token_ids), (row.prompt_token_ids, row.rejected_token_ids)]
        for row in rows
    ]
    with torch.no_grad(), autocast:
        reference = [[logp(model, *side) for side in pair] for pair in sides]
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    size = settings["pairs_per_step"]
    batches = [order[start : start + size] for start in range(0, len(order), size)]
    found = []
    for step, batch in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = settings["learning_rate"] * rate(step, len(batches))
        ratios = []
        for row in batch:
            with autocast:
                logps = [logp(model, *side) for side in sides[row]]
            chosen, rejected = (now - before for now, before in zip(logps, reference[row], strict=True))
            loss = -torch.nn.functional.logsigmoid(settings["beta"] * (chosen - rejected)) / len(batch)
            loss.backward()
            ratios.append((float(chosen.detach()), float(rejected.detach())))
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings["clip"])
        optimizer.step()
        optimizer.zero_grad()
        chosen_mean, rejected_mean = (sum(side) / len(batch) for side in zip(*ratios, strict=True))
        found.append((chosen_mean, rejected_mean))
    return found


def logged(run: RunFolder, iteration: int, steps: Sequence[int]) -> list[tuple[float, float]]:
    """Return what the run logged at the steps of an iteration."""
    with run.metrics.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row.get("train/logratios/chosen")]
    start = sum(steps[:iteration])
    return [
        (float(row["train/logratios/chosen"]), float(row["train/logratios/rejected"]))
        for row in rows[start : start + steps[iteration]]
    ]


def main() -> None:
    """Run the comparison."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("--model", required=True, help="that the run started from")
    parser.add_argument(
        "--iterations", type=int, default=1, help="the last of them is taken in other orders too"
    )
    parser.add_argument("--order-seeds", type=int, nargs="*", default=[])
    parser.add_argument("--bf16", action="store_true", help="the last iteration once more, in bfloat16")
    args = parser.parse_args()
    run, config = RunFolder(args.run), yaml.safe_load((args.run / "config.yaml").read_bytes())
    settings = {
        "beta": config["model"]["loss"]["init_args"]["beta"],
        "learning_rate": config["model"]["learning_rate"],
        "pairs_per_step": config["data"]["pairs_per_step"],
        "clip": config["trainer"]["gradient_clip_val"],
    }
    pairs = [run.iteration(number).read_pairs() for number in range(args.iterations)]
    steps = [-(-len(table) // settings["pairs_per_step"]) for table in pairs]
    model: Any = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()

    def once(policy: Any, number: int, seed: int, *, bf16: bool = False) -> list[tuple[float, float]]:
        keys = random_keys(distinct(pairs[number].prompt_ids), seed, number, 0, "order")
        begun = time.monotonic()
        found = train(policy, pairs[number], keys.argsort(stable=True).tolist(), settings, bf16=bf16)
        lowest = min(chosen for chosen, _ in found)
        print(
            f"iteration {number}, order of seed {seed}, {'bfloat16' if bf16 else 'float32'}: chosen log-ratio lowest "
            f"{lowest:.2f}, last {found[-1][0]:.2f} (rejected {found[-1][1]:.2f}); {time.monotonic() - begun:.0f} s",
            flush=True,
        )
        return found

    for number in range(args.iterations):
        start = copy.deepcopy(model) if number == args.iterations - 1 else None
        found, said = once(model, number, config["seed_everything"]), logged(run, number, steps)
        apart = max(
            abs(a - b) for mine, its in zip(found, said, strict=True) for a, b in zip(mine, its, strict=True)
        )
        print(f"  differs from what the run logged by at most {apart:.2g} nat", flush=True)
        if start is not None:
            for seed in args.order_seeds:
                once(copy.deepcopy(start), number, seed)
            if args.bf16:
                once(copy.deepcopy(start), number, config["seed_everything"], bf16=True)


if __name__ == "__main__":
    main()
