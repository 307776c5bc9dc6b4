"""Time and host memory of one iteration as the prompts grow, with an engine that answers at once.

What is measured is everything but the models: reading and encoding prompts, rollout shards, difficulty, selection,
pairing, and a training epoch of a model that is almost nothing. One process a size, so that peaks are clean.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from arms import peak_bytes

SAMPLES = 8


def engine() -> type:
    """Return the engine's class; a function, so that the measuring process alone imports the package."""
    from sppo_lightning.generation import Generator, PolicySource, PromptResponses, SampleRequest
    from sppo_lightning.types import Response

    class Instant(Generator):
        """Answers with random tokens."""

        def load(self, policy: PolicySource) -> None:
            pass

        def generate(self, requests: Sequence[SampleRequest]) -> Iterator[PromptResponses]:
            for index, request in enumerate(requests):
                yield PromptResponses(index, [self._response(seed) for seed in request.seeds or (0,)])

        def _response(self, seed: int) -> Response:
            tokens = random.Random(seed).choices(range(3, 200), k=self.max_new_tokens)
            return Response(tuple(tokens), " ".join(map(str, tokens)), "stop")

        def unload(self) -> None:
            pass

    return Instant


def write_inputs(folder: Path, prompts: int, words: int) -> None:
    """Write a tiny policy with a word tokenizer, and the prompts."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocabulary = {name: number for number, name in enumerate(["<bos>", "<eos>", "<pad>"])}
    vocabulary |= {f"w{number}": number + 3 for number in range(197)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"
    ).save_pretrained(folder / "policy")
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=200,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=2,
        )
    ).save_pretrained(folder / "policy")
    draw = random.Random(0)
    with (folder / "prompts.jsonl").open("w") as file:
        for number in range(prompts):
            text = " ".join(f"w{draw.randrange(197)}" for _ in range(words))
            file.write(json.dumps({"id": f"prompt-{number}", "prompt": text}) + "\n")


def fit(folder: Path, new_tokens: int) -> dict[str, float]:
    """Run one iteration in this process; return seconds and peak memory."""
    import lightning.pytorch as pl
    import torch

    from sppo_lightning.callbacks import DifficultyReestimation, SelfPlayCallback
    from sppo_lightning.datamodule import SelfPlayDataModule
    from sppo_lightning.losses import DPOLoss
    from sppo_lightning.module import PreferenceModule
    from sppo_lightning.policy.config import PolicyConfig
    from sppo_lightning.rewards import FunctionReward
    from sppo_lightning.selection import Easiest
    from sppo_lightning.types import PhaseProgress

    torch.set_num_threads(1)

    def reward(prompts: list[str], responses: list[str], metadata: list[dict[str, Any]]) -> list[float]:
        return [float(hash(text[:16]) % 1000) for text in responses]

    class Times(SelfPlayCallback):
        """Seconds of each phase."""

        def __init__(self) -> None:
            self.found: dict[str, float] = {}
            self.start = 0.0

        def on_phase_progress(self, trainer: pl.Trainer, progress: PhaseProgress) -> None:
            if progress.done == 0:
                self.start = time.perf_counter()
            if progress.done == progress.total:
                spent = time.perf_counter() - self.start
                self.found[progress.phase] = self.found.get(progress.phase, 0.0) + spent

    datamodule = SelfPlayDataModule(
        prompts=str(folder / "prompts.jsonl"),
        iterations=1,
        samples_per_prompt=SAMPLES,
        generator=engine()(max_new_tokens=new_tokens, temperature=1.0),
        reward=FunctionReward(reward),
        selection=Easiest(0.3),
        pairs_per_step=256,
        batch_size=16,  # small, so that what training holds for a moment does not hide what grows
        prompts_per_shard=256,
    )
    times = Times()
    module = PreferenceModule(
        PolicyConfig(str(folder / "policy")), DPOLoss(0.1), 1e-3, reference="previous_iteration"
    )
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        default_root_dir=folder / "run",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        reload_dataloaders_every_n_epochs=1,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        callbacks=[DifficultyReestimation(), times],
    )
    start = time.perf_counter()
    trainer.fit(module, datamodule)
    whole = time.perf_counter() - start
    peak = peak_bytes()
    store = datamodule.folder.iteration(0)
    start = time.perf_counter()
    datamodule.difficulty_after(0)
    difficulty = time.perf_counter() - start
    start = time.perf_counter()
    pairs = len(store.read_pairs())
    return {
        "seconds": whole,
        **{f"seconds_{name}": value for name, value in times.found.items()},
        "seconds_difficulty_from_store": difficulty,
        "seconds_open_pairs": time.perf_counter() - start,
        "pairs": pairs,
        "peak_mb": peak / 2**20,
        "store_mb": sum(path.stat().st_size for path in store.folder.rglob("*.parquet")) / 2**20,
    }


def main() -> None:
    """Run every size and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1_000, 10_000, 100_000])
    parser.add_argument("--prompt-words", type=int, default=50)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    settings = parser.parse_args()
    if settings.folder:
        print(json.dumps(fit(settings.folder, settings.new_tokens)))
        return
    results = {}
    for size in settings.sizes:
        with tempfile.TemporaryDirectory() as name:
            write_inputs(Path(name), size, settings.prompt_words)
            output = subprocess.run(
                [sys.executable, *sys.argv, "--folder", name], stdout=subprocess.PIPE, text=True, check=True
            )
        results[size] = json.loads(output.stdout.splitlines()[-1])
        print(size, {key: round(value, 2) for key, value in results[size].items()}, flush=True)
    if settings.json:
        settings.json.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
