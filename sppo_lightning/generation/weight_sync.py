"""Ways to make a server answer with the current policy."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar
from uuid import uuid4

from sppo_lightning.generation.protocol import PolicySource
from sppo_lightning.generation.served_models import served_models
from sppo_lightning.system.servers import Failure, ServerClient, UnknownModelError
from sppo_lightning.types import SPEED_OR_PLACE, UserError

KEY = "data.generator.weight_sync"
PREFIX = "policy-"  # of the exports in a folder; whatever else lies there stays


class WeightSync(ABC):
    """Hands the current policy to a server; chosen in the config by ``class_path``."""

    names_model: ClassVar[bool] = True
    """Whether the model to ask for is the hand-over's own; else it is the generator's ``model``."""
    on_policy: ClassVar[bool] = True
    """Whether the server is to answer as the policy does, which is checked before each phase."""
    free_settings: ClassVar[frozenset[str]] = SPEED_OR_PLACE | {"folder"}
    """Arguments of the constructor that decide speed or place, never a response: a run that resumes may change them."""

    @abstractmethod
    def hand_over(self, policy: PolicySource, *, client: ServerClient, model: str | None) -> str:
        """Make the server answer with the current policy.

        Args:
            policy: the current policy.
            client: the server, open.
            model: the generator's ``model``; ``None`` where the hand-over names the model.

        Returns:
            The model name to ask for.

        Raises:
            UserError: if the server does not take the policy.
        """


class ModelFolder(WeightSync):
    """Exports the policy into a folder and asks for its path: for ``transformers serve``, run against the real one.

    The server loads whatever path a request names. What its completions endpoint has no field for, it takes from the
    export's generation config, which is made neutral: left alone, it would not sample at all without ``do_sample``,
    and from the 50 most likely tokens only without ``top_k``. Start it without ``--continuous-batching``, which
    answers every request with the temperature of the first.

    Args:
        folder: of this run alone, and one that the server sees under the same path.
    """

    def __init__(self, folder: str) -> None:
        self.folder = _absolute(folder)
        if "@" in str(self.folder):
            raise ValueError(
                f"ModelFolder.folder={str(self.folder)!r} must not contain @: the server takes what follows for a "
                "revision"
            )

    def hand_over(self, policy: PolicySource, *, client: ServerClient, model: str | None) -> str:
        """Export the policy and return the path."""

        def prepare(fresh: Path) -> None:
            _check_whole_model(fresh)
            write_neutral_generation_config(fresh, policy.end_token_ids)

        return str(exported(policy, self.folder, prepare=prepare))


class VLLMAdapter(WeightSync):
    """Loads the policy's adapter into vLLM: for ``model.policy.lora``.

    Every policy gets an adapter name of its own, so that no answer and no cached prefix can come from older weights;
    the adapters of older policies are unloaded. vLLM has to serve the policy's base model with ``--enable-lora``, a
    ``--max-lora-rank`` that holds the adapter, and ``VLLM_ALLOW_RUNTIME_LORA_UPDATING=True`` in its environment. It
    takes no DoRA.

    Args:
        folder: of this run alone, and one that the server sees under the same path.
        adapter: what adapter names start with; runs that share a server need one each.
    """

    def __init__(self, folder: str, adapter: str = "policy") -> None:
        if not adapter:
            raise ValueError("VLLMAdapter.adapter must not be empty")
        self.folder = _absolute(folder)
        self.adapter = adapter

    def hand_over(self, policy: PolicySource, *, client: ServerClient, model: str | None) -> str:
        """Load the adapter under a new name and return it."""
        if policy.quantized:
            raise UserError(
                f"{KEY} VLLMAdapter: the policy's base is quantised and the server's is not, so that samples would "
                "come from another model: set model.policy.quantization: none, or use HFGenerator"
            )
        place = exported(policy, self.folder, prepare=_check_adapter)
        name = f"{self.adapter}-{place.name.removeprefix(PREFIX)}"
        served = _served_names(client)
        if name not in served:
            refusal = _load_adapter(client, name, place)
            # another process of this run may have been faster, which the server calls an error
            if refusal is not None and name not in _served_names(client):
                raise UserError(
                    f"{KEY} VLLMAdapter: the server does not take the adapter {place} ({refusal}): it must run with "
                    "--enable-lora, a --max-lora-rank that holds model.policy.lora.rank and "
                    "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True in its environment, and see that folder"
                )
        for older in served:
            if older.rpartition("-")[0] == self.adapter and older != name:
                with suppress(UserError):  # gone already
                    client.post("unload_lora_adapter", {"lora_name": older})
        return name


class SGLangWeights(WeightSync):
    """Has SGLang read all weights from a folder, and forget the prefixes cached from the old ones.

    Written against SGLang's documented API; not yet run against a real server.

    Args:
        folder: of this run alone, and one that the server sees under the same path.
    """

    names_model: ClassVar[bool] = False

    def __init__(self, folder: str) -> None:
        self.folder = _absolute(folder)

    def hand_over(self, policy: PolicySource, *, client: ServerClient, model: str | None) -> str:
        """Update the weights of the served model and return its name."""
        assert model is not None
        place = exported(policy, self.folder, prepare=_check_whole_model)
        root = client.base_url.rstrip("/").removesuffix("/v1")
        answer = client.post(
            f"{root}/update_weights_from_disk", {"model_path": str(place), "flush_cache": True}
        )
        if not (isinstance(answer, dict) and answer.get("success") is True):
            message = answer.message if isinstance(answer, Failure) else client.quoted(answer)
            raise UserError(
                f"{KEY} SGLangWeights: the server does not take the weights in {place} ({message}): it must see that "
                "folder, and serve the policy's architecture"
            )
        return model


class OffPolicy(WeightSync):
    """Hands nothing over: samples come from the server's own weights, whatever training does; tried on a real server.

    Difficulty and pairs are then the served model's, off-policy from iteration 1 on at the latest. Under
    ``transformers serve`` that model's generation config decides whether anything is sampled: it needs ``do_sample``.
    """

    names_model: ClassVar[bool] = False
    on_policy: ClassVar[bool] = False

    def __init__(self) -> None:
        self._warned = False

    def hand_over(self, policy: PolicySource, *, client: ServerClient, model: str | None) -> str:
        """Return the served model's name, with a warning the first time."""
        assert model is not None
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"{KEY} OffPolicy: responses come from {model!r} as {client.base_url} serves it, which training "
                "does not change: from iteration 1 on at the latest they are off-policy.",
                stacklevel=2,
            )
        return model


def exported(policy: PolicySource, folder: Path, *, prepare: Callable[[Path], None]) -> Path:
    """Return the folder below ``folder`` that holds the current policy, and remove those of older policies.

    It is named after the policy's fingerprint and written under another name first, so that one that is there is
    whole and needs no second export.

    Args:
        policy: the current policy.
        folder: where exports lie.
        prepare: checks and completes an export before it gets its name.
    """
    place = folder / f"{PREFIX}{policy.fingerprint()}"
    if not place.exists():
        folder.mkdir(parents=True, exist_ok=True)
        fresh = folder / f"{place.name}.{uuid4().hex}"
        try:
            policy.export(fresh)
            prepare(fresh)
            _sync(fresh)
            try:
                fresh.rename(place)
            except OSError:
                if not place.exists():  # else another process of this run was faster
                    raise
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
    for other in folder.glob(f"{PREFIX}*"):
        if not other.name.startswith(place.name):  # its unfinished exports may be another process's
            shutil.rmtree(other, ignore_errors=True)
    return place


def write_neutral_generation_config(folder: Path, end_token_ids: frozenset[int]) -> None:
    """Make a model folder's generation config sample from the plain distribution until an end token.

    Args:
        folder: a Hugging Face model folder.
        end_token_ids: what ends a response.
    """
    path = folder / "generation_config.json"
    before: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    kept = {name: before[name] for name in ("bos_token_id", "pad_token_id") if name in before}
    neutral = {
        "do_sample": True,
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "eos_token_id": sorted(end_token_ids),
    }
    path.write_text(json.dumps(kept | neutral, indent=2))


def _absolute(folder: str) -> Path:
    return Path(folder).expanduser().absolute()


def _check_whole_model(folder: Path) -> None:
    if not (folder / "config.json").exists():
        raise UserError(
            f"{KEY} needs the whole model, but the policy exports an adapter: leave model.policy.lora out, or use "
            "sppo_lightning.generation.VLLMAdapter with vLLM"
        )


def _check_adapter(folder: Path) -> None:
    if not (folder / "adapter_config.json").exists():
        raise UserError(
            f"{KEY} VLLMAdapter needs an adapter, but the policy exports a whole model: set model.policy.lora"
        )
    if json.loads((folder / "adapter_config.json").read_text()).get("use_dora"):
        raise UserError(
            f"{KEY} VLLMAdapter: vLLM serves no adapter with DoRA: set model.policy.lora.dora: false, or use "
            "sppo_lightning.generation.HFGenerator"
        )


def _load_adapter(client: ServerClient, name: str, place: Path) -> str | None:
    """Have vLLM load an adapter, and return why it does not, or ``None``; what it refuses once, it refuses again."""
    try:
        answer = client.post("load_lora_adapter", {"lora_name": name, "lora_path": str(place)}, repeat=False)
    except UnknownModelError as error:
        return str(error)
    return answer.message if isinstance(answer, Failure) else None


def _served_names(client: ServerClient) -> list[str]:
    models = served_models(client)
    if isinstance(models, Failure):
        raise UserError(
            f"{KEY}: {client.base_url}/models lists no models ({models.message}): correct base_url"
        )
    return [model.name for model in models]


def _sync(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
