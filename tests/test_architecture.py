"""The layers of docs/architecture.md: which package may import which, and what users may name."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# a line imports from the lines above it, and each name from itself; names on one line do not know each other
LAYERS = """
types
seeding paths text redaction limits short_names
losses schedules difficulty
selection pairing system prompts
store policy
resume pair_forward rewards loggers
generation training
rollouts
iteration evaluation memory predictions
module
export judging preflight report
datamodule
callbacks chat study watch
cli
__main__ __init__
"""
LAYER_OF = {name: layer for layer, line in enumerate(LAYERS.split("\n")) for name in line.split()}
PURE = ["losses", "schedules", "difficulty", "selection", "pairing", "seeding", "text"]
STANDARD = {
    "torch",
    "__future__",
    "abc",
    "array",
    "collections",
    "dataclasses",
    "hashlib",
    "math",
    "re",
    "typing",
}
WITHOUT_LIGHTNING = [
    "system",
    "prompts",
    "store",
    "policy",
    "pair_forward",
    "rewards",
    "generation",
    "rollouts",
    "iteration",
    "evaluation",
    "predictions",
    "judging",
]
PUBLIC = {
    "sppo_lightning": "PreferenceModule SelfPlayDataModule UserError",
    "sppo_lightning.losses": """
        APODownLoss APOZeroLoss AlignedPolicyConfidence AlphaDivergence ChosenNLL CombinedLoss DPOLoss DPOPLoss
        DiscoPOPLoss Divergence EXOPairLoss FDivergenceDPOLoss ForwardKL HingeLoss IPOLoss JensenShannon
        KTOPairLoss LDDPOLoss LengthNormalizedDPOLoss LengthRegularization LossInputs NCAPairLoss ORPOLoss
        PairLogps PairValues PolicyConfidence PreferenceLoss PreferenceTerms REBELLoss RewardGap RobustDPOLoss
        SPPOLoss SPPOSoftLoss SimPOLoss SummedIPOLoss WeightedLoss Weighting
    """,
    "sppo_lightning.schedules": "Constant Cosine LearningRateSchedule Linear",
    "sppo_lightning.selection": """
        AdaptiveTarget All AllOf AllPairs AllPrompts Band CategoryBandit Curriculum DifficultyPools DisjointSplits
        DropHardest Easiest EasyToHard HardToEasy Hardest HighestLearnability HighestPVar HighestPerplexity
        HighestRewardGap HighestRewardStd HighestShare LargestLogpMargin LowestPerplexity LowestShare MatchedRandom
        MatchedRandomSubset PerCategory RIP RIPThresholds RandomFraction RandomOrder RandomSubset RewardBand Rule
        Schedule Selection SkipTied SmallestLogpMargin
    """,
    "sppo_lightning.pairing": """
        BestMinimumOf BestNearest BestRandom BestWorst Choice LengthPenalizedBestWorst MarginThreshold
        MatchedRandomPairs Outcome Pairing RandomPairs Responses TopPairs
    """,
    "sppo_lightning.rewards": """
        CombinedReward Comparison FunctionJudge FunctionReward JSONRewards Judge LengthPenalty OpenAIJudge
        PairwiseReward Reward SGLangClassify ScoreFormat Scores SequenceClassificationReward ServerReward
        TorchmetricsReward VLLMPooling WinProbabilityReward
    """,
    "sppo_lightning.generation": """
        AutoGenerator CachedGenerator ContinuousBatchingGenerator Generator HFGenerator ModelFolder OffPolicy
        OpenAIServerGenerator PolicySource PromptResponses SGLangWeights SampleRequest VLLMAdapter VLLMGenerator
        WeightSync
    """,
    "sppo_lightning.predictions": """
        AlpacaEval ArenaHard JSONLines MTBench Prediction PredictionFormat
    """,
    "sppo_lightning.judging": """
        Annotator Answer AnswerSet LabelProbabilities Reading RewardAnnotator ServerJudge Shown Verdict VerdictFormat
        WrittenVerdict
    """,
    "sppo_lightning.callbacks": """
        DifficultyReestimation DisplacementWarning GradientNorm InitialEvaluation IterationGate IterationHistograms
        LearningDiagnostics PhaseMemory PhaseTimes PolicyExport ReportFile RunCheckpoint RunSummary SampleTable
        SelfPlayCallback SelfPlayProgress WeightUpdateCheck
    """,
    "sppo_lightning.loggers": "TrackioLogger",
    "sppo_lightning.pair_forward": "AutoForward PairForward PlainForward SharedForward VarlenForward",
    "sppo_lightning.export": """
        DataExporter ExportFormat Exporter FinishedRun GGUFReadyModel HFModel MergedModel PEFTAdapter PreferenceData
        SavedPolicy StoredRun
    """,
}
"""Class paths that a config or a user's module may name."""


def source_files() -> list[Path]:
    package = ROOT / "sppo_lightning"
    own = [path for path in package.rglob("*.py") if "callbacks" not in path.relative_to(package).parts]
    return own + list((ROOT / "callbacks").glob("*.py"))


def module_of(path: Path) -> str:
    """Its dotted name below ``sppo_lightning``; a package's is that of its folder."""
    base = ROOT if path.parent.name == "callbacks" else ROOT / "sppo_lightning"
    parts = path.relative_to(base).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


FILES = {module_of(path): path for path in source_files()}


def imported(path: Path) -> Iterator[str]:
    """Every module that a file imports, inside functions and for type checking too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: import by full name"
            assert node.module is not None
            names = [f"{node.module}.{alias.name}" for alias in node.names if alias.name != "__version__"]
            yield from (
                name if name.removeprefix("sppo_lightning.") in FILES else node.module for name in names
            )


def own_imports(path: Path) -> set[str]:
    """The modules of this project that a file imports."""
    names = {name for name in imported(path) if name.partition(".")[0] == "sppo_lightning"}
    return {name.removeprefix("sppo_lightning").lstrip(".") or "__init__" for name in names}


def test_every_package_has_a_layer() -> None:
    assert {name.partition(".")[0] for name in FILES} == set(LAYER_OF)


@pytest.mark.parametrize("name", sorted(FILES))
def test_imports_go_to_lower_layers(name: str) -> None:
    own = name.partition(".")[0]
    for other in own_imports(FILES[name]):
        package = other.partition(".")[0]
        below = package == own or LAYER_OF[package] < LAYER_OF[own]
        assert below, f"{name} imports {other}, which stands on its own layer or above"


def test_no_module_is_part_of_a_circle() -> None:
    """A package's face is what imports from outside see; inside, modules name each other."""
    graph = {}
    for name, path in FILES.items():
        graph[name] = own_imports(path) - {name}
        if path.name == "__init__.py":
            graph[name] -= {other for other in FILES if "." not in other and other == name}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"circle: {' -> '.join(error.args[1])}")


@pytest.mark.parametrize("name", [name for name in sorted(FILES) if name.partition(".")[0] in PURE])
def test_pure_modules_import_torch_and_the_standard_library_only(name: str) -> None:
    for other in imported(FILES[name]):
        assert other.partition(".")[0] in STANDARD | {"sppo_lightning"}, other


@pytest.mark.parametrize("package", WITHOUT_LIGHTNING)
def test_engines_never_see_a_trainer(package: str) -> None:
    seen = [
        (name, other)
        for name, path in FILES.items()
        if name.partition(".")[0] == package
        for other in imported(path)
        if other == "lightning" or other.startswith("lightning.pytorch")
        if other != "lightning.pytorch.utilities"  # rank_zero_info and its like
    ]
    assert not seen


@pytest.mark.parametrize("place", PUBLIC)
def test_public_class_paths(place: str) -> None:
    module = importlib.import_module(place)
    expected = set(PUBLIC[place].split())
    assert all(inspect.isclass(getattr(module, name)) for name in expected)
    listed = getattr(module, "__all__", None)
    own = {
        name
        for name, value in vars(module).items()
        if inspect.isclass(value) and not name.startswith("_") and value.__module__ == place
    }
    found = set(listed or own)
    assert expected <= found | own, f"{place} lacks {expected - found}"
    if listed is not None:
        assert {name for name in listed if inspect.isclass(getattr(module, name))} == expected


def test_callbacks_refuse_another_name() -> None:
    spec = importlib.util.spec_from_file_location("callbacks", ROOT / "callbacks/__init__.py")
    assert spec is not None
    assert spec.loader is not None
    with pytest.raises(
        ImportError, match=r"import it under that name|is the package sppo_lightning.callbacks"
    ):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


@pytest.mark.parametrize("command", ["report", "study", "watch"])
def test_a_command_that_reads_starts_without_what_trains(command: str) -> None:
    """Lightning, transformers and torchmetrics take most of the seconds that ``fit`` takes to start."""
    code = f"import sys, sppo_lightning.{command}.command; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert {"lightning", "transformers", "torchmetrics", "peft", "datasets"}.isdisjoint(loaded.split())
