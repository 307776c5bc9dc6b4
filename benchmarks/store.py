"""Time and memory of a run's store at scale: what a run reads and writes between its models' phases.

A step runs in a process of its own, so that peaks are clean; memory is what the peak grows by after the imports, the
prompts included where a step needs them. The store is made of random words, the same at every call.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from arms import peak_bytes

SAMPLES = 8  # of each prompt, half of them from the probe: the join of two sets of shards is measured too
PROMPT_WORDS = 60
RESPONSE_TOKENS = 100
MAX_TOKENS = 150
VOCABULARY = 5000
STEP_PAIRS = 256


def prompts_of(count: int) -> Any:
    """Return the encoded prompts by id, packed as a run holds them."""
    from sppo_lightning.prompts.ragged import RaggedColumn
    from sppo_lightning.prompts.table import EncodedPrompts, PromptTable
    from sppo_lightning.types import Message, Prompt

    table, tokens = PromptTable(), RaggedColumn("i")
    draw, words = random.Random(1), vocabulary()
    for number in range(count):
        drawn = draw.choices(range(VOCABULARY), k=PROMPT_WORDS)
        text = " ".join(words[word] for word in drawn)
        table.append(Prompt(id_of(number), text, (Message(role="user", content=text),)))
        tokens.append(drawn)
    return EncodedPrompts(table, tokens, range(count)).by_id()


def id_of(number: int) -> str:
    """Return a prompt's id."""
    return f"prompt-{number:07d}"


def vocabulary() -> list[str]:
    """Return random words of 2 to 8 letters."""
    draw = random.Random(0)
    return ["".join(draw.choices("etaoinshrdlu", k=draw.randint(2, 8))) for _ in range(VOCABULARY)]


class Steps:
    """The steps of an iteration that read or write its store, each callable in a fresh process.

    Args:
        root: run folder.
        count: prompts.
    """

    def __init__(self, root: Path, count: int) -> None:
        from sppo_lightning.iteration.rules import IterationRules
        from sppo_lightning.pairing import BestWorst
        from sppo_lightning.selection import AllPairs, AllPrompts, Easiest, EasyToHard
        from sppo_lightning.store.run_folder import RunFolder

        self.count = count
        self.folder = RunFolder(root)
        self.store = self.folder.iteration(0)
        self.rules = IterationRules(
            iterations=1,
            samples_per_prompt=SAMPLES,
            probe_samples=SAMPLES // 2,
            pairs_per_step=STEP_PAIRS,
            batch_size=8,
            schedule=AllPrompts(),
            selection=Easiest(0.3),
            pairing=BestWorst(),
            pair_selection=AllPairs(),
            seed=0,
            curriculum=EasyToHard(),
        )

    def write(self) -> Callable[[], Any]:
        """Write the scored shards."""
        from sppo_lightning.rollouts.shard_size import prompts_per_shard
        from sppo_lightning.types import Rollout

        prompts, words = prompts_of(self.count), vocabulary()
        ids = list(prompts)

        def row(prompt_id: str, index: int) -> Rollout:
            draw = random.Random(f"{prompt_id}/{index}")
            length = draw.randint(RESPONSE_TOKENS // 2, RESPONSE_TOKENS * 3 // 2)
            token_ids = tuple(draw.choices(range(VOCABULARY), k=length))
            text = " ".join(words[word] for word in token_ids)
            prompt = prompts[prompt_id].prompt.text
            return Rollout(prompt_id, index, prompt, text, token_ids, "stop", draw.gauss(0, 1))

        def run() -> None:
            half = SAMPLES // 2
            size = prompts_per_shard(self.count, half, max_new_tokens=MAX_TOKENS)
            for name, indices in (("probe", range(half)), ("topup", range(half, SAMPLES))):
                for number, start in enumerate(range(0, self.count, size)):
                    shard = ids[start : start + size]
                    self.store.shards.write(
                        name, number, [row(key, index) for key in shard for index in indices]
                    )

        return run

    def keys(self) -> Callable[[], Any]:
        """Ask what every shard holds, as a phase does when a run is started again."""
        from sppo_lightning.rollouts.shard_size import prompts_per_shard

        shards = range(
            -(-self.count // prompts_per_shard(self.count, SAMPLES // 2, max_new_tokens=MAX_TOKENS))
        )
        return lambda: [
            self.store.shards.key(name, number) for name in ("probe", "topup") for number in shards
        ]

    def difficulty(self) -> Callable[[], Any]:
        """Difficulty from all rewards."""
        return self._difficulty

    def _difficulty(self) -> Any:
        from sppo_lightning.difficulty import empty_difficulty_table
        from sppo_lightning.iteration.builder import difficulty_after

        rewards = self.store.shards.rewards()
        return difficulty_after(
            rewards, empty_difficulty_table(), iteration=0, smoothing=0.0, at_random=False
        )

    def select(self) -> Callable[[], Any]:
        """Select 30 %, write and read the difficulties."""
        table = self._difficulty()

        def run() -> None:
            keep = self.rules.selection.select(table, iteration=0, seed=0).tolist()
            self.store.write_difficulty(
                table, {key for key, kept in zip(table.prompt_ids, keep, strict=True) if kept}
            )
            self.store.read_difficulty()

        return run

    def pair(self) -> Callable[[], Any]:
        """Count all responses, pair those of the selected prompts, write the pairs."""
        prompts = prompts_of(self.count)

        def run() -> None:
            from sppo_lightning.iteration.pairing_pass import PairingPass
            from sppo_lightning.pairing import pair_statistics

            table, selected = self.store.read_difficulty()
            made = PairingPass(self.rules, prompts, 0)
            pairs = made.pairs(self.store.shards, prompts, selected)
            paired = table.rows(pairs.prompt_ids)
            difficulty = dict(zip(paired.prompt_ids, paired["difficulty"].tolist(), strict=True))
            statistics = pair_statistics(pairs.prompt_ids, pairs.statistics(), made.rewards, difficulty)
            self.rules.selection.select(statistics, iteration=0, seed=0)
            self.store.write_pairs(pairs)
            made.counters.metrics()

        return run

    def epoch(self) -> Callable[[], Any]:
        """Read the pairs and put an epoch's steps in order; 100 micro-batches."""
        from sppo_lightning.iteration.state import IterationState
        from sppo_lightning.pair_forward.layouts import SharedLayout
        from sppo_lightning.training.batching import PairDataset

        class Alone:
            rank, world_size = 0, 1

        def run() -> None:
            state = IterationState(self.folder, self.rules, epochs=1, ranks=Alone())
            state.current, state.pairs = 0, self.store.read_pairs()
            steps = state.steps(0, global_step=0)
            dataset, batches = PairDataset(state.pairs, SharedLayout()), list(steps)
            for batch in random.Random(0).choices(batches, k=100):
                dataset[batch]

        return run


NAMES = ("write", "keys", "difficulty", "select", "pair", "epoch")


def measure(name: str, root: Path, count: int) -> dict[str, float]:
    """Run one step in this process."""
    import torch

    import sppo_lightning.iteration.state  # noqa: F401

    torch.set_num_threads(1)
    empty = peak_bytes()
    run = getattr(Steps(root, count), name)()
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    return {
        "wall": time.perf_counter() - wall,
        "cpu": time.process_time() - cpu,
        "grown_mb": (peak_bytes() - empty) / 2**20,
    }


def main() -> None:
    """Run every step in a process of its own, and print what it took."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=100_000)
    parser.add_argument("--folder", type=Path, help="scratch folder, kept; default: a temporary one")
    parser.add_argument(
        "--steps", nargs="+", choices=NAMES, default=NAMES, help="'write' comes first, once a folder"
    )
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--measure", choices=NAMES, help=argparse.SUPPRESS)
    settings = parser.parse_args()
    if settings.measure:
        print(json.dumps(measure(settings.measure, settings.folder, settings.prompts)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = settings.folder or Path(temporary)
        results = {}
        for name in settings.steps:
            options = ["--folder", str(folder), "--prompts", str(settings.prompts), "--measure", name]
            output = subprocess.run(
                [sys.executable, sys.argv[0], *options], stdout=subprocess.PIPE, text=True, check=True
            )
            results[name] = json.loads(output.stdout.splitlines()[-1])
            print(name, {key: round(value, 2) for key, value in results[name].items()}, flush=True)
        files = [path.stat().st_size for path in (folder / "iterations").rglob("*-*.parquet")]
        results["files"] = {"shards": len(files), "largest_mb": max(files) / 2**20, "mb": sum(files) / 2**20}
        print("files", {key: round(value, 2) for key, value in results["files"].items()})
    if settings.json:
        settings.json.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
