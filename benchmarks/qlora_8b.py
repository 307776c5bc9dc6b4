"""Write what a QLoRA run of 8B models needs: policy and reward model with random weights, prompts, and the config.

Weights are drawn and written a layer at a time, so that no model is ever held; the reward model's files are links to
the policy's, its own score aside. Every word of the tokenizer is a token, so that lengths are exact and a response read
by the reward model has the tokens that were sampled. Then run ``sppo-lightning fit --config FOLDER/config.yaml``.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
import workload
import yaml
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedTokenizerFast,
)

SPECIAL = ["<bos>", "<eos>", "<pad>"]
CHAT_TEMPLATE = "{{ bos_token }}{% for message in messages %} {{ message['content'] }}{% endfor %}"
SPREAD = 0.02  # standard deviation of the weights, as Llama's own before its training
INDEX = "model.safetensors.index.json"


class Lengths(NamedTuple):
    """Sizes of the run."""

    prompt_tokens: int
    new_tokens: int
    rows: int  # responses that grow at once


LENGTHS = {"8b": Lengths(1024, 256, 16), "tiny": Lengths(48, 12, 4)}
PROMPTS = 16
HELD_OUT = 1  # so that its evaluation shows what one response takes


def write_weights(shapes: dict[str, torch.Size], folder: Path, settings: argparse.Namespace) -> None:
    """Write random bfloat16 weights in Hugging Face's layout, one file a decoder layer; norms are ones."""
    files: defaultdict[str, dict[str, torch.Size]] = defaultdict(dict)
    for name, shape in shapes.items():
        parts = name.split(".")
        layer = "-".join(parts[:3]) if "layers" in parts else parts[-2]
        files[f"{layer}.safetensors"][name] = shape
    generator = torch.Generator(settings.device).manual_seed(settings.seed)
    for number, (file, tensors) in enumerate(files.items()):
        if not (folder / file).exists():
            drawn = {name: weight(shape, generator).cpu() for name, shape in tensors.items()}
            save_file(drawn, folder / "unfinished", metadata={"format": "pt"})
            (folder / "unfinished").rename(folder / file)
        print(f"{folder / file}: {number + 1} of {len(files)}", flush=True)
    size = sum(2 * shape.numel() for shape in shapes.values())
    places = {name: file for file, tensors in files.items() for name in tensors}
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": places}))


def weight(shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """Return one weight, on the generator's device."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    values = torch.empty(shape, dtype=torch.bfloat16, device=generator.device)
    return values.normal_(std=SPREAD, generator=generator)


def link_weights(source: Path, target: Path) -> None:
    """Give ``target`` the files of ``source`` but the output head, without a copy."""
    for file in source.glob("*.safetensors"):
        if file.name != "lm_head.safetensors":
            place = target / file.name
            place.unlink(missing_ok=True)
            place.symlink_to(Path("..", source.name, file.name))


def write_model(auto: Any, config: PretrainedConfig, folder: Path, settings: argparse.Namespace) -> None:
    """Write the model that ``auto`` makes of a config, but for files that are there already."""
    with torch.device("meta"):
        model = auto.from_config(config)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    model.config.architectures, model.config.dtype = [type(model).__name__], "bfloat16"
    model.config.save_pretrained(folder)
    tokenizer(config.vocab_size).save_pretrained(folder)
    write_weights(shapes, folder, settings)


def tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """Return a tokenizer whose tokens are the words ``w3``, ``w4``, … and three special ones."""
    words = {name: number for number, name in enumerate(SPECIAL)}
    words |= {f"w{number}": number for number in range(len(SPECIAL), vocabulary)}
    backend = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"
    )
    made.chat_template = CHAT_TEMPLATE
    return made


def write_prompts(file: Path, count: int, words: int, vocabulary: int, seed: int) -> None:
    """Write prompts of exactly so many random words."""
    draw = random.Random(f"{seed} {file.stem}")
    rows = [
        {
            "id": f"{file.stem}-{number}",
            "prompt": " ".join(f"w{draw.randrange(len(SPECIAL), vocabulary)}" for _ in range(words)),
        }
        for number in range(count)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def run_config(folder: Path, settings: argparse.Namespace) -> dict[str, Any]:
    """Return the config of the run: QLoRA of rank 64 as in ``configs/qlora-8b-1gpu.yaml``, with fewer tokens."""
    lengths = LENGTHS[settings.shape]
    package = "sppo_lightning"
    return {
        "seed_everything": settings.seed,
        "trainer": {
            "accelerator": {"cuda": "gpu"}.get(settings.device, settings.device),
            "devices": 1,
            "precision": "bf16-mixed",
            "default_root_dir": str(folder / "run"),
            "gradient_clip_val": 1.0,
            "logger": False,
        },
        "model": {
            "policy": {
                "pretrained": str(folder / "policy"),
                "quantization": "nf4",
                "lora": {"rank": 64, "alpha": 128},
                "gradient_checkpointing": True,
            },
            "optimizer": {"class_path": "bitsandbytes.optim.PagedAdamW8bit"},
            "reference": "previous_iteration",
            "loss": {"class_path": f"{package}.losses.DPOLoss", "init_args": {"beta": 0.1}},
            "learning_rate": 1.0e-5,
        },
        "data": {
            "prompts": str(folder / "prompts.jsonl"),
            "eval_prompts": str(folder / "eval.jsonl"),
            "max_prompt_tokens": lengths.prompt_tokens,
            "iterations": 1,
            "samples_per_prompt": 4,
            "probe_samples": 2,
            "selection": {"class_path": f"{package}.selection.Easiest", "init_args": {"fraction": 0.5}},
            "generator": {
                "class_path": f"{package}.generation.HFGenerator",
                "init_args": {
                    "batch_size": lengths.rows,
                    "max_new_tokens": lengths.new_tokens,
                    "temperature": 1.0,
                },
            },
            "reward": {
                "class_path": f"{package}.rewards.SequenceClassificationReward",
                "init_args": {
                    "pretrained": str(folder / "reward"),
                    "quantization": "nf4",
                    "batch_tokens": lengths.prompt_tokens + lengths.new_tokens,  # one conversation at a time
                },
            },
            "pairs_per_step": 4,
            "batch_size": 1,
        },
    }


def main() -> None:
    """Write everything."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    cuda = torch.cuda.is_available()
    parser.add_argument("folder", type=Path, help="where it goes; 16 GB for the 8B shape")
    parser.add_argument("--shape", choices=LENGTHS, default="8b")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if cuda else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.set_defaults(layers=None)
    settings = parser.parse_args()
    config = workload.model_config(settings)
    folder = settings.folder.resolve()
    policy, reward = folder / "policy", folder / "reward"
    for place in (policy, reward):
        place.mkdir(parents=True, exist_ok=True)
    write_model(AutoModelForCausalLM, config, policy, settings)
    link_weights(policy, reward)
    config.num_labels = 1
    write_model(AutoModelForSequenceClassification, config, reward, settings)
    words = LENGTHS[settings.shape].prompt_tokens - 1  # and a <bos>
    for name, count in (("prompts", PROMPTS), ("eval", HELD_OUT)):
        write_prompts(folder / f"{name}.jsonl", count, words, config.vocab_size, settings.seed)
    (folder / "config.yaml").write_text(yaml.safe_dump(run_config(folder, settings), sort_keys=False))
    print(f"{folder / 'config.yaml'} is ready")


if __name__ == "__main__":
    main()
