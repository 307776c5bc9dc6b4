"""Whole optimizer steps of this package side by side with TRL's ``DPOTrainer`` on the same pairs.

A round is one optimizer step of a real ``Trainer.fit`` or ``DPOTrainer.train``: loader, forward, backward, optimizer,
logging. A gate comes first, in float32: the loss of the first step is ln 2 in every arm, log-probs and gradients agree.
Between the arms' steps the products of the same step are timed alone: no step can be faster.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import arms
import flops
import torch
import workload
from gate import Agreement, compare, is_shared
from workload import Size

GRIDS = {
    "small": [Size(256, 128, 4), Size(512, 64, 4), Size(32, 256, 4)],
    "large": [Size(512, 512, 4), Size(2048, 256, 2), Size(8192, 64, 1)],
}
PRODUCTS = "products"  # the arm that only multiplies matrices
PACKAGES = ("torch", "transformers", "lightning", "peft", "accelerate")
FIRST_STEP = ["--precision=32-true", "--steps=1", "--warm-up=0", "--layers=4"]


class Gate(NamedTuple):
    """What the gate found."""

    agreements: dict[str, Agreement]  # of each arm with the last one
    shared: dict[str, bool]  # whether an arm reads a prompt once for both responses


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    cuda = torch.cuda.is_available()
    off_on = argparse.BooleanOptionalAction
    parser.add_argument("--model", help="a Hugging Face folder")
    parser.add_argument("--shape", choices=workload.SHAPES, help="random weights instead of a folder's")
    parser.add_argument("--layers", type=int, help="decoder layers of --shape, instead of its own number")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if cuda else "cpu")
    parser.add_argument("--precision", choices=["bf16-mixed", "32-true"], default="bf16-mixed")
    parser.add_argument(
        "--lora-rank", type=int, help="train an adapter on frozen weights; 0: train all weights"
    )
    parser.add_argument("--checkpointing", action=off_on, help="gradient checkpointing in every arm")
    parser.add_argument(
        "--grid",
        choices=GRIDS,
        help="run these sizes instead of one; large: of --shape 8b, --lora-rank 16, --checkpointing, unless said "
        "otherwise. Without a grid and without a size: large on CUDA, else small",
    )
    parser.add_argument("--prompt-tokens", type=int)
    parser.add_argument("--response-tokens", type=int)
    parser.add_argument("--pairs", type=int, help="of a step, in one micro-batch")
    parser.add_argument("--ragged", action="store_true", help="lengths vary up to the sizes given")
    parser.add_argument("--steps", type=int, default=20, help="measured in each arm")
    parser.add_argument("--warm-up", type=int, default=6, help="steps of each arm before them")
    parser.add_argument(
        "--arms",
        default="ours,trl-best",
        help="some of ours, ours-compiled, ours-clipped, plain, trl-best, trl-compile, trl-default; ratios are against "
        "the last one",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--arm", help=argparse.SUPPRESS)
    parser.add_argument("--first-step", type=Path, help=argparse.SUPPRESS)
    settings = parser.parse_args()
    if settings.grid is None and not any((settings.prompt_tokens, settings.response_tokens, settings.pairs)):
        settings.grid = "large" if settings.device == "cuda" else "small"
    large = settings.grid == "large"
    if settings.model is None and settings.shape is None and large:
        settings.shape = "8b"
    if (settings.model is None) == (settings.shape is None):
        parser.error("give either --model or --shape")
    if settings.lora_rank is None:
        settings.lora_rank = 16 if large else 0
    if settings.checkpointing is None:
        settings.checkpointing = large
    return settings


def sizes(settings: argparse.Namespace) -> list[Size]:
    """Return the sizes to measure."""
    if settings.grid is not None:
        return GRIDS[settings.grid]
    return [Size(settings.prompt_tokens or 256, settings.response_tokens or 128, settings.pairs or 4)]


def options(settings: argparse.Namespace, size: Size) -> list[str]:
    """Return the command line's words for an arm's process, whatever this process was given."""
    return [*([] if settings.grid is None else [f"--grid={settings.grid}"]), *size.options()]


def run_arm(settings: argparse.Namespace) -> None:
    """Be the process of one arm."""
    rounds = arms.Rounds(torch.device(settings.device))
    if settings.arm == PRODUCTS:
        time_products(settings, rounds)
        return
    if settings.arm.startswith("trl-"):
        import trl_arm as arm
    else:
        import our_arm as arm
    if settings.first_step is None:
        arm.time_steps(settings, rounds, settings.arm)
    else:
        arm.first_step(settings, settings.arm).write(settings.first_step)


def time_products(settings: argparse.Namespace, rounds: arms.Rounds) -> None:
    """Multiply the matrices of a step with shared prompts, once a round; operations are the round's tokens."""
    config = workload.model_config(settings)
    pairs = workload.token_pairs(settings, config.vocab_size)
    steps = len(pairs) / settings.pairs
    products = flops.Products(
        flops.architecture(config),
        tokens=round(sum(pair.tokens - len(pair.prompt) for pair in pairs) / steps),
        scored=round(sum(len(pair.chosen) + len(pair.rejected) for pair in pairs) / steps),
        frozen=settings.lora_rank > 0,
        dtype=workload.compute_dtype(settings),
        device=torch.device(settings.device),
    )
    while True:
        rounds.wait()
        operations, seconds = products.measure()
        rounds.report(operations, seconds=seconds)


def check_gate(settings: argparse.Namespace, names: list[str], size: Size) -> Gate:
    """Compare every arm's first step with the last arm's; end the program if they do not agree."""
    few = size._replace(pairs=min(2, size.pairs))
    small = argparse.Namespace(**{**vars(settings), **few._asdict(), "steps": 1, "warm_up": 0})
    pairs = workload.token_pairs(small, workload.model_config(settings).vocab_size)[: few.pairs]
    lengths = [len(pair.chosen) for pair in pairs] + [len(pair.rejected) for pair in pairs]
    found = Gate({}, {})
    with tempfile.TemporaryDirectory() as folder:
        files = {name: Path(folder) / f"{name}.safetensors" for name in names}
        for name, file in files.items():
            words = [*options(settings, few), *FIRST_STEP, f"--first-step={file}", "--arm", name]
            status = subprocess.run([sys.executable, *sys.argv, *words]).returncode
            if status:
                raise SystemExit(
                    f"the first step of {name} ended with exit status {status}: nothing is timed"
                )
            found.shared[name] = is_shared(file)
        for name in names[:-1]:
            agreement = compare(files[name], files[names[-1]], torch.tensor(lengths))
            failure = agreement.failure()
            if failure is not None:
                raise SystemExit(f"{name} against {names[-1]}: {failure} ({agreement}): nothing is timed")
            found.agreements[name] = agreement
    return found


def measure(settings: argparse.Namespace, size: Size) -> dict[str, Any]:
    """Gate and time the arms at one size, print a table, and return everything for the record."""
    settings = argparse.Namespace(**{**vars(settings), **size._asdict()})
    names = settings.arms.split(",")
    gate = check_gate(settings, names, size)
    warm_up, measured = workload.rounds(settings)
    results = arms.alternate(
        [*names[:-1], PRODUCTS, names[-1]], rounds=measured, warm_up=warm_up, options=options(settings, size)
    )
    rate = results.pop(PRODUCTS)
    config = workload.model_config(settings)
    pairs = workload.token_pairs(settings, config.vocab_size)
    steps = len(pairs) / settings.pairs
    model, frozen = flops.architecture(config), settings.lora_rank > 0
    work = {
        shared: flops.Work(
            *(part / steps for part in flops.step_work(model, pairs, shared=shared, frozen=frozen))
        )
        for shared in (True, False)
    }
    tokens = sum(pair.tokens for pair in pairs) / steps
    for name, row in results.items():
        row["pairs_per_s"] = settings.pairs / row["seconds"]
        # both ratios are against the last arm inside a palindrome, where the machine is the same for all
        token_seconds = row["paired_ratio"] / rate["paired_ratio"] / tokens
        row["share_computed"] = work[gate.shared[name]].products * token_seconds
        row["share_effective"] = work[False].products * token_seconds
    arms.report(
        title(settings, size),
        results,
        None,
        {},
        columns={
            "s/step": "seconds",
            "pairs/s": "pairs_per_s",
            "CPU-s/step": "cpu_seconds",
            "paired ratio": "paired_ratio",
            "(q25": "paired_ratio_q25",
            "q75)": "paired_ratio_q75",
            "share computed": "share_computed",
            "share effective": "share_effective",
        },
    )
    print(
        f"products alone, prompts shared: {rate['seconds']:.3g} s a step, {rate['tokens_per_s'] / 1e9:.4g} Gflop/s "
        f"({rate['tokens_per_s_q25'] / 1e9:.4g}-{rate['tokens_per_s_q75'] / 1e9:.4g})\n"
        f"work of a step: prompts shared {describe(work[True])}; not shared {describe(work[False])}; "
        f"{sum(work[False]) / sum(work[True]):.2f} times as much\n",
        flush=True,
    )
    return {
        "size": size._asdict(),
        "gate": {name: agreement._asdict() for name, agreement in gate.agreements.items()},
        "results": results,
        "products_seconds": rate["seconds"],
        "products_flop_per_s": [rate[f"tokens_per_s{part}"] for part in ("_q25", "", "_q75")],
        "flop_shared": work[True]._asdict(),
        "flop_not_shared": work[False]._asdict(),
        "load": os.getloadavg(),
    }


def title(settings: argparse.Namespace, size: Size) -> str:
    """Return a line that says what is measured."""
    lengths = "up to " if settings.ragged else ""
    trained = f"LoRA rank {settings.lora_rank}" if settings.lora_rank else "all weights"
    return (
        f"optimizer step: {lengths}P={size.prompt_tokens} R={size.response_tokens}, {size.pairs} pairs, "
        f"{settings.shape or Path(settings.model).name}, {trained}, {settings.precision}, "
        f"checkpointing {'on' if settings.checkpointing else 'off'}, {settings.device}"
    )


def describe(work: flops.Work) -> str:
    """Return operations in words."""
    linear, head, attention = (f"{part / 1e9:.4g}" for part in work)
    return f"{linear} + head {head} + attention {attention} Gflop"


def main() -> None:
    """Run every size and print a table for each."""
    settings = parse()
    if settings.arm:
        run_arm(settings)
        return
    found = []
    for size in sizes(settings):
        found.append(measure(settings, size))
        if settings.json:  # after each size, so that a long run leaves what it has
            versions = {name: version(name) for name in PACKAGES}
            record = {"settings": workload.as_json(settings), "versions": versions, "sizes": found}
            settings.json.write_text(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
