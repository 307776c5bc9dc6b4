"""The model card of an exported policy: what it is, what it was trained on, what it reached, how to load it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PureWindowsPath
from typing import Any, Literal

import yaml

from sppo_lightning import __version__
from sppo_lightning.evaluation.results import HEADINGS, held_out_results
from sppo_lightning.export.check import Distance
from sppo_lightning.export.finished_run import FinishedRun
from sppo_lightning.policy.config import LoRAConfig
from sppo_lightning.policy.folder import base_arguments, opened_by_peft
from sppo_lightning.types import SPEED_OR_PLACE, PreferencePair

HERE = "path/to/this/folder"
# settings of components that say nothing about the result
FREE = {*SPEED_OR_PLACE, "weight_sync", "trust_remote_code"}
VLLM_RANK = 16  # the highest that vLLM takes without --max-lora-rank
REFERENCES = {
    "previous_iteration": "the policy as it was when each iteration began",
    "initial": "the policy that the run started from",
}
KINDS = {
    "hf": "the whole model",
    "adapter": "a LoRA adapter in PEFT's layout, without its base",
    "merged": "base and adapter merged into a whole model",
    "gguf-ready": "a whole model, ready for llama.cpp's `convert_hf_to_gguf.py`",
}


def model_card(
    source: FinishedRun,
    *,
    format: Literal["hf", "adapter", "merged", "gguf-ready"],
    distances: Sequence[Distance],
    pairs: Sequence[PreferencePair],
    altered: Sequence[str] = (),
    moved: float | None = None,
    loader: str = "AutoModelForCausalLM",
) -> str:
    """Return an exported folder's ``README.md``. It holds no paths, addresses of servers or keys of this machine.

    Args:
        source: the exported policy.
        format: of the folder.
        distances: outcome of the check.
        pairs: that it was made on.
        altered: weights in the folder that are not what was to be written.
        moved: what training changed in the log-probs of their responses, nats per token, where that is known.
        loader: name of transformers' class to load the model by, or the base of an adapter.
    """
    base = model_name(source.policy.pretrained)
    front = {
        "base_model": base,
        "library_name": "peft" if format == "adapter" else "transformers",
        "pipeline_tag": "text-generation",
        "tags": list(_tags(source)),
    }
    trained = f"A low-rank adapter on {base} was" if source.adapted else f"All weights of {base} were"
    sections = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---",
        f"# {base}, trained by self-play preference optimisation",
        f"{trained} trained with sppo-lightning for {source.iteration + 1} self-play iteration(s), on preference pairs "
        f"among its own responses, which a reward ranked. This folder holds {KINDS[format]}.",
        *_results(source),
        "## Settings",
        _table(("setting", "value"), settings(source)),
        "## How to load it",
        *_loading(source, format, loader),
        "## Check",
        *_check(source, distances, pairs, moved),
        *_bits(source, format, altered),
        "## Made with",
        _versions(),
    ]
    return "\n\n".join(sections) + "\n"


def settings(source: FinishedRun) -> Iterator[tuple[str, str]]:
    """Yield the settings that decide a policy, with their values in words."""
    model, data, policy = source.config["model"], source.config["data"], source.policy
    held = str(source.held_dtype).removeprefix("torch.")
    yield "base model", model_name(policy.pretrained)
    if policy.lora is not None:
        yield "trained", _adapter_in_words(policy.lora)
        yield "base held in", held if policy.quantization == "none" else policy.quantization
    else:
        yield "trained", f"all weights, held in {held}"
    yield "iterations", f"{source.iteration + 1} of {data['iterations']}"
    yield "epochs in each", str(data.get("epochs_per_iteration", 1))
    yield "prompts", ", ".join(map(model_name, _listed(data["prompts"])))
    for name in ("schedule", "selection", "pairing", "pair_selection", "curriculum"):
        if data.get(name) is not None:
            yield name.replace("_", " "), component(data[name])
    yield "responses to each prompt", str(data["samples_per_prompt"])
    if data.get("probe_samples") is not None:
        yield "of these for its difficulty", str(data["probe_samples"])
    yield "generator", component(data["generator"])
    yield "reward", component(data["reward"])
    yield "loss", component(model["loss"])
    yield "reference", REFERENCES[model["reference"]]
    yield "learning rate", f"{model['learning_rate']:g}"
    if model.get("lr_schedule") is not None:
        yield "its schedule in an iteration", component(model["lr_schedule"])
    yield "pairs in an optimizer step", str(data["pairs_per_step"])
    yield "seed", str(source.config["seed_everything"])


def component(value: Any) -> str:
    """Return a configured component in one line: its class and what decides its results, without places."""
    if isinstance(value, Mapping) and "class_path" in value:
        arguments = (value.get("init_args") or {}).items()
        shown = [
            f"{name}={component(item)}" for name, item in arguments if name not in FREE and item is not None
        ]
        return f"{value['class_path'].rpartition('.')[2]}({', '.join(shown)})"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{name}: {component(item)}" for name, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(component, value)) + "]"
    return f"{value:g}" if isinstance(value, float) else model_name(str(value))


def model_name(location: str) -> str:
    """Return what a model or file is called, without where it lies on this machine.

    Hub ids stay whole, so do names inside a copy of the hub's cache; an address is not shown.
    """
    if "://" in location:
        return "(an address)"
    cached = re.search(r"(?:models|datasets)--([^/\\]+)--([^/\\]+)", location)
    if cached:
        return f"{cached[1]}/{cached[2]}"
    if "\\" in location:
        return PureWindowsPath(location).name or location
    looks_local = location.startswith(("/", "./", "../", "~")) or location.count("/") > 1
    if looks_local or ("/" in location and Path(location).exists()):
        return Path(location).name or location
    return location


def _listed(value: str | Sequence[str]) -> Sequence[str]:
    return [value] if isinstance(value, str) else value


def _tags(source: FinishedRun) -> Iterator[str]:
    yield from ("sppo-lightning", "self-play", "preference-optimization")
    if source.config["model"]["loss"]["class_path"].endswith(".DPOLoss"):
        yield "dpo"
    if source.policy.lora is not None:
        yield "lora" if source.policy.quantization == "none" else "qlora"


def _adapter_in_words(lora: LoRAConfig) -> str:
    kind = "DoRA" if lora.dora else "LoRA"
    if lora.adapter is not None:
        return f"the {kind} adapter {model_name(lora.adapter)}, further"
    targets = lora.target_modules if isinstance(lora.target_modules, str) else ", ".join(lora.target_modules)
    scale = "alpha / sqrt(rank)" if lora.rslora else "alpha / rank"
    return (
        f"{kind} adapter: rank {lora.rank}, alpha {lora.alpha:g}, scaled by {scale}, dropout {lora.dropout:g}, on "
        f"{targets}"
    )


def _results(source: FinishedRun) -> list[str]:
    results = held_out_results(source.folder, source.iteration + 1)
    if not results:
        return []
    return [
        "## Results",
        "Greedy answers to held-out prompts; mean ± standard error. The gain compares prompt by prompt; a win is a "
        "higher reward than the initial policy's answer has, a tie half of one.",
        _table(HEADINGS, (result.cells for result in results)),
    ]


def _loading(source: FinishedRun, format: str, loader: str) -> Iterator[str]:
    base = source.policy.pretrained
    if format == "gguf-ready":
        yield "With llama.cpp's converter:"
        yield f"```sh\npython convert_hf_to_gguf.py {HERE} --outtype bf16 --outfile model.gguf\n```"
        yield "It is a Hugging Face folder like any other, too:"
    if format != "adapter":
        yield _python(
            f"from transformers import {loader}, AutoTokenizer",
            f'model = {loader}.from_pretrained("{HERE}")',
        )
        return
    if opened_by_peft(base, loader):
        yield _python(
            "from peft import AutoPeftModelForCausalLM",
            "from transformers import AutoTokenizer",
            f'model = AutoPeftModelForCausalLM.from_pretrained("{HERE}")',
        )
        if Path(base).exists():
            yield (
                f"The base, {model_name(base)}, was a folder where this was written: where it lies elsewhere, correct "
                "`base_model_name_or_path` in `adapter_config.json`."
            )
    else:
        local = Path(base).exists() or base.endswith(".gguf")
        shown = f"path/to/its/folder/{model_name(base)}" if local else base
        yield f"PEFT cannot open {model_name(base)}, the base, by itself:"
        yield _python(
            "from peft import PeftModel",
            f"from transformers import {loader}, AutoTokenizer",
            f"base = {loader}.from_pretrained({base_arguments(shown)})",
            f'model = PeftModel.from_pretrained(base, "{HERE}")',
        )
    yield from _adapter_notes(source)


def _adapter_notes(source: FinishedRun) -> Iterator[str]:
    quantization, settings = source.policy.quantization, source.adapter_settings()
    if quantization != "none":
        yield (
            f"The adapter was trained on its base in {quantization}; on the base without quantisation it gives nearly "
            "the same policy (see below)."
        )
    if settings["use_dora"]:
        yield (
            "This is a DoRA adapter. vLLM serves none, and `AutoModelForCausalLM.from_pretrained` of transformers 5 "
            "leaves its magnitudes out: load it with PEFT as above, or export `--format merged`."
        )
    elif settings["r"] > VLLM_RANK:
        yield f"vLLM serves it with `--enable-lora --max-lora-rank {settings['r']}` or more."
    else:
        yield "vLLM serves it with `--enable-lora`."


def _check(
    source: FinishedRun, distances: Sequence[Distance], pairs: Sequence[PreferencePair], moved: float | None
) -> Iterator[str]:
    tokens = sum(len(pair.chosen_token_ids) + len(pair.rejected_token_ids) for pair in pairs)
    yield (
        f"Log-probs of the {tokens} response tokens in {len(pairs)} pair(s) of iteration {source.iteration}, computed "
        "in float32; mean absolute difference in nats per token:"
    )
    rows = (
        (found.between, f"{found.nats:.2g}", f"{found.allowed:.2g}: {found.because}", _passed(found))
        for found in distances
    )
    yield _table(("between", "difference", "allowed", "outcome"), rows)
    if moved is not None:
        yield f"For scale: training moved these log-probs by {moved:.2g}."


def _bits(source: FinishedRun, format: str, altered: Sequence[str]) -> Iterator[str]:
    if altered:
        yield f"FAILED: {len(altered)} weights in this folder are not what was to be written, e.g. {altered[0]}."
    elif format != "adapter":
        which = "matrix that the adapter changed" if source.adapted else "weight"
        yield f"Read back, each {which} was what had been written, bit by bit."


def _passed(found: Distance) -> str:
    return "passed" if found.holds else "FAILED"


def _versions() -> str:
    from importlib.metadata import version

    others = ", ".join(f"{name} {version(name)}" for name in ("transformers", "peft", "torch"))
    return f"sppo-lightning {__version__} ({others})."


def _python(*lines: str) -> str:
    tokenizer = f'tokenizer = AutoTokenizer.from_pretrained("{HERE}")'
    return "\n".join(["```python", *lines, tokenizer, "```"])


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|")
