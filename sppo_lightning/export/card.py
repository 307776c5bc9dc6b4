"""The model card of an exported policy: what it is, what it was trained on, what it reached, how to load it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PureWindowsPath
from typing import Any

import yaml

from sppo_lightning import __version__
from sppo_lightning.evaluation.results import HEADINGS, held_out_results
from sppo_lightning.export.check import Check
from sppo_lightning.export.exporter import Exporter
from sppo_lightning.export.finished_run import FinishedRun
from sppo_lightning.export.saved_policy import SavedPolicy
from sppo_lightning.policy.config import LoRAConfig
from sppo_lightning.redaction import masked
from sppo_lightning.text import for_markdown
from sppo_lightning.types import SPEED_OR_PLACE

# settings of components that say nothing about the result
FREE = {*SPEED_OR_PLACE, "weight_sync", "trust_remote_code"}
REFERENCES = {
    "previous_iteration": "the policy as it was when each iteration began",
    "initial": "the policy that the run started from",
}


def model_card(exporter: Exporter, policy: SavedPolicy, check: Check | None) -> str:
    """Return an exported folder's ``README.md``. It holds no paths, addresses of servers or keys of this machine.

    Args:
        exporter: that wrote the folder.
        policy: that was exported.
        check: what the comparison of the two found; ``None`` if there was none.
    """
    source = policy.run
    base = model_name(source.policy_config.pretrained)
    front = {
        "base_model": base,
        "library_name": exporter.library,
        "pipeline_tag": "text-generation",
        "tags": list(_tags(source)),
    }
    name = for_markdown(base)
    trained = f"A low-rank adapter on {name} was" if source.has_adapter else f"All weights of {name} were"
    loading = list(exporter.how_to_load(policy))
    sections = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---",
        f"# {name}, trained by self-play preference optimisation",
        f"{trained} trained with sppo-lightning for {source.iteration + 1} self-play iteration(s), on preference pairs "
        f"among its own responses, which a reward ranked. This folder holds {exporter.holds}.",
        *_results(source),
        "## Settings",
        table(("setting", "value"), settings(source)),
        *(["## How to load it", *loading] if loading else []),
        "## Check",
        *_check(source, check),
        "## Made with",
        versions(),
    ]
    return "\n\n".join(sections) + "\n"


def settings(source: FinishedRun) -> Iterator[tuple[str, str]]:
    """Yield the settings that decide a policy, with their values in words."""
    model, data, policy = source.config["model"], source.config["data"], source.policy_config
    held = str(source.weights_dtype).removeprefix("torch.")
    yield "base model", model_name(policy.pretrained)
    if policy.lora is not None:
        yield "trained", _adapter_in_words(policy.lora)
        yield "base held in", held if policy.quantization == "none" else policy.quantization
    else:
        yield "trained", f"all weights, held in {held}"
    yield "iterations", f"{source.iteration + 1} of {data['iterations']}"
    if data.get("steps_per_iteration") is not None:
        yield "optimizer steps in each", str(data["steps_per_iteration"])
    else:
        yield "epochs in each", str(data.get("epochs_per_iteration", 1))
    yield from data_settings(data)
    yield "loss", component(model["loss"])
    yield "reference", REFERENCES[model["reference"]]
    yield "learning rate", f"{model['learning_rate']:g}"
    if model.get("lr_schedule") is not None:
        yield "its schedule in an iteration", component(model["lr_schedule"])
    yield "pairs in an optimizer step", str(data["pairs_per_step"])
    yield "seed", str(source.config["seed_everything"])


def data_settings(data: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the settings that decide an iteration's pairs, with their values in words; ``data``: the config's part."""
    yield "prompts", ", ".join(map(model_name, _listed(data["prompts"])))
    for name in ("schedule", "selection", "pairing", "pair_selection", "curriculum"):
        if data.get(name) is not None:
            yield name.replace("_", " "), component(data[name])
    yield "responses to each prompt", str(data["samples_per_prompt"])
    if data.get("probe_samples") is not None:
        yield "of these for its difficulty", str(data["probe_samples"])
    yield "generator", component(data["generator"])
    yield "reward", component(data["reward"])


def component(value: Any) -> str:
    """Return a configured component in one line: its class and what decides its results, without places.

    The values of a class that is not this package's own are left out: nobody here knows which of them are private.
    """
    if isinstance(value, Mapping) and "class_path" in value:
        arguments = masked(value.get("init_args") or {}).items()
        own = value["class_path"].startswith("sppo_lightning.")
        shown = [
            f"{name}={component(item) if own else _components(item)}"
            for name, item in arguments
            if name not in FREE and item is not None
        ]
        return f"{value['class_path'].rpartition('.')[2]}({', '.join(shown)})"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{name}: {component(item)}" for name, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(component, value)) + "]"
    return f"{value:g}" if isinstance(value, float) else model_name(str(value))


def _components(value: Any) -> str:
    """Return the components inside a setting; of anything else, that it is there."""
    return component(value) if isinstance(value, Mapping) and "class_path" in value else "…"


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
    if source.policy_config.lora is not None:
        yield "lora" if source.policy_config.quantization == "none" else "qlora"


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
        table(HEADINGS, (result.cells for result in results)),
    ]


def _check(source: FinishedRun, check: Check | None) -> Iterator[str]:
    if check is None:
        yield "This folder was not compared with the trained policy: its exporter reads nothing back."
        return
    tokens = sum(len(pair.chosen_token_ids) + len(pair.rejected_token_ids) for pair in check.pairs)
    yield (
        f"Log-probs of the {tokens} response tokens in {len(check.pairs)} pair(s) of iteration {source.iteration}, "
        "computed in float32; mean absolute difference in nats per token:"
    )
    rows = (
        (
            found.between,
            f"{found.nats:.2g}",
            f"{found.allowed:.2g}: {found.because}",
            "passed" if found.holds else "FAILED",
        )
        for found in check.distances
    )
    yield table(("between", "difference", "allowed", "outcome"), rows)
    if check.moved is not None:
        yield f"For scale: training moved these log-probs by {check.moved:.2g}."
    if check.altered:
        count, first = len(check.altered), for_markdown(check.altered[0])
        yield f"FAILED: {count} weights in this folder are not what was to be written, e.g. {first}."
    elif check.weights:
        which = "matrix that the adapter changed" if source.has_adapter else "weight"
        yield f"Read back, each {which} was what had been written, bit by bit."


def versions() -> str:
    """Return what a folder was made with."""
    from importlib.metadata import version

    others = ", ".join(f"{name} {version(name)}" for name in ("transformers", "peft", "torch"))
    return f"sppo-lightning {__version__} ({others})."


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table in Markdown; cells are texts of anybody."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(map(for_markdown, line))} |" for line in lines)
