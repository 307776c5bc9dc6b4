"""The rooms of docs/architecture.md: who may import whom."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = {
    0: "types",
    1: "losses logprobs difficulty selection pairing rules schedules seeding shards",
    2: """
        prompts prompt_files prompt_sets prompt_table ragged
        rollouts stored_rollouts reference_parts pruning pairs tally durable integrity
        policy_config pretrained adapters batching layouts metrics servers
        stop_signal heartbeat rendezvous
    """,
    3: """
        policy lora quantized_layers live_policy optimizers memory sharding
        pair_forward forward_trial own_attention shared_attention response_head compiled_layers
        generation rewards scoring collect evaluation results
        iteration iteration_state pairing_pass reference_pass reference_checks
    """,
    4: "module datamodule preflight memory_check trainer checkpoint_files metrics_csv",
    5: "callbacks estimate export",
    6: "cli parse_errors run_config run_lock __main__ __init__",
}
LAYER_OF = {room: layer for layer, rooms in LAYERS.items() for room in rooms.split()}
PURE = {"torch", "__future__", "abc", "array", "collections", "dataclasses", "hashlib", "math", "typing"}


def source_files() -> list[Path]:
    package = ROOT / "sppo_lightning"
    own = [path for path in package.rglob("*.py") if "callbacks" not in path.relative_to(package).parts]
    return own + list((ROOT / "callbacks").glob("*.py"))


def room_of(path: Path) -> str:
    if path.parent.name == "callbacks":
        return "callbacks"
    parts = path.relative_to(ROOT / "sppo_lightning").parts
    return parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    """Every module that a file imports, function-local imports included, except for type checking."""
    tree = ast.parse(path.read_text())
    skipped: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            skipped |= {id(child) for child in ast.walk(node)}
    names: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: import by full name"
            assert node.module is not None
            names.add(node.module)
            if node.module == "sppo_lightning":
                names |= {f"sppo_lightning.{alias.name}" for alias in node.names}
    return names


def test_every_room_has_a_layer() -> None:
    assert {room_of(path) for path in source_files()} == set(LAYER_OF)


@pytest.mark.parametrize("path", source_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_downwards(path: Path) -> None:
    room = room_of(path)
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "sppo_lightning" and len(parts) > 1:
            assert LAYER_OF[parts[1]] <= LAYER_OF[room], f"{room} imports {parts[1]} from above"


@pytest.mark.parametrize("room", LAYERS[1].split())
def test_pure_rooms_import_torch_and_the_standard_library_only(room: str) -> None:
    for name in imports(ROOT / f"sppo_lightning/{room}.py"):
        assert name.split(".")[0] in PURE | {"sppo_lightning"}, name


@pytest.mark.parametrize(
    "room", ["generation", "rewards", "scoring", "collect", "iteration", "iteration_state"]
)
def test_engines_never_see_a_trainer(room: str) -> None:
    for path in source_files():
        if room_of(path) == room:
            assert not any(name.startswith("lightning") for name in imports(path)), path


def test_callbacks_refuse_another_name() -> None:
    import importlib.util

    spec = importlib.util.spec_from_file_location("callbacks", ROOT / "callbacks/__init__.py")
    assert spec is not None
    assert spec.loader is not None
    with pytest.raises(
        ImportError, match=r"import it under that name|is the package sppo_lightning.callbacks"
    ):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
