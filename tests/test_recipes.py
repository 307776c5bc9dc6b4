"""Every recipe: small, sourced, and run with a tiny model as it stands but for model, prompts and sizes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from support.runs import cli_arguments

from sppo_lightning.__main__ import main
from sppo_lightning.store.run_folder import RunFolder

ROOT = Path(__file__).parent.parent
BASE = ROOT / "configs/recipes/base.yaml"
RECIPES = sorted(path for path in BASE.parent.glob("*.yaml") if path != BASE)
SOURCED = re.compile(r"# .*(published|ours|arXiv|SPPO|SimPO|Online-RLHF)")
pytestmark = pytest.mark.filterwarnings("ignore")
by_recipe = pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
ALWAYS_RUN = ("difficulty-easiest-30", "sppo")  # the others are slow
run_by_recipe = pytest.mark.parametrize(
    "recipe",
    [
        pytest.param(path, id=path.stem, marks=[] if path.stem in ALWAYS_RUN else pytest.mark.slow)
        for path in RECIPES
    ],
)


@by_recipe
def test_a_recipe_is_a_small_override(recipe: Path) -> None:
    assert recipe.read_text().startswith("# ")
    assert len(recipe.read_text().splitlines()) < 40


@pytest.mark.parametrize("path", [BASE, *RECIPES], ids=lambda path: path.stem)
def test_each_number_names_its_source(path: Path) -> None:
    for line in path.read_text().splitlines():
        if re.search(r": [^#]*\d", line) and not line.lstrip().startswith(
            ("#", "seed_everything", "batch_size")
        ):
            given = line if "#" in line else _after(path, line)
            assert SOURCED.search(given), f"no source: {line.strip()}"


def _after(path: Path, line: str) -> str:
    """The lines up to the one with the next comment: a class and its arguments may share one."""
    rest = path.read_text().split(line, 1)[1]
    return rest[: rest.find("\n", rest.find("#"))]


def arguments(recipe: Path, policy: Path, prompts: Path, root: Path) -> list[str]:
    tiny = {
        argument.removeprefix("--").split("=")[0]: argument
        for argument in cli_arguments(policy, prompts / "train.jsonl", root)
    }
    kept = ["trainer.accelerator", "trainer.precision", "trainer.default_root_dir", "trainer.logger"]
    kept += ["model.policy.pretrained", "data.prompts", "data.pairs_per_step", "data.batch_size"]
    reward = {
        "class_path": "sppo_lightning.rewards.FunctionReward",
        "init_args": {"function": "support.runs.letter_reward"},
    }
    parts = [yaml.safe_load(path.read_text()) for path in (BASE, recipe)]
    kind = parts[1].get("data", {}).get("reward", {}).get("class_path", "")
    slot = "data.reward.init_args.reward" if kind.endswith("WinProbabilityReward") else "data.reward"
    return [
        *(f"--config={path}" for path in (BASE, recipe)),
        *(tiny[name] for name in kept),
        f"--{slot}={json.dumps(reward)}",
        "--data.generator.init_args.max_new_tokens=8",
        f"--data.eval_prompts={prompts / 'eval.jsonl'}",
    ]


@pytest.fixture(scope="module")
def many_prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("many")
    for name, count in (("train", 36), ("eval", 4)):
        records = [{"prompt": f"{name} {n}", "category": f"c{n % 3}"} for n in range(count)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


@run_by_recipe
def test_a_recipe_runs(recipe: Path, tiny_policy: Path, many_prompts: Path, tmp_path: Path) -> None:
    main(["fit", *arguments(recipe, tiny_policy, many_prompts, tmp_path / "run")])
    folder = RunFolder(tmp_path / "run")
    config = yaml.safe_load(folder.config.read_text())
    assert all(folder.iteration(number).complete for number in range(config["data"]["iterations"]))
    given = yaml.safe_load(recipe.read_text())
    loss = given.get("model", {}).get("loss")
    assert loss is None or config["model"]["loss"]["class_path"] == loss["class_path"]


@run_by_recipe
def test_a_recipe_is_estimated(
    recipe: Path, tiny_policy: Path, many_prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["estimate", *arguments(recipe, tiny_policy, many_prompts, tmp_path / "run")])
    assert "training" in capsys.readouterr().out
