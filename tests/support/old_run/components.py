"""A generator or reward of each shipped class, and ``descriptions.json``: what commit a42d472 said of them."""

from __future__ import annotations

from torchmetrics.text import BLEUScore

from sppo_lightning import generation, rewards

SAMPLING = {"max_new_tokens": 8, "temperature": 0.9, "stop": ["\n"]}
UNSTOPPED = {"max_new_tokens": 8, "temperature": 0.9, "top_k": 5}
SERVER = {"base_url": "http://localhost:1/v1", "timeout": 3.0}


def function(prompts: list[str], responses: list[str], metadata: list[object]) -> list[float]:
    """Return the responses' lengths."""
    return [float(len(response)) for response in responses]


def components() -> dict[str, object]:
    """Return the objects by their classes' names, with settings of each kind: decisive, default, speed and place."""
    judge = rewards.OpenAIJudge(
        model="judge", instructions="{prompt} {first} {second}", max_tokens=9, **SERVER
    )
    classifier = rewards.SequenceClassificationReward(
        "reward", batch_tokens=9, dtype="float32", between_phases="free"
    )
    served = rewards.ServerReward(format=rewards.JSONRewards(batch_size=3), **SERVER)
    pairwise = rewards.PairwiseReward(judge, opponents=2)
    own = rewards.FunctionReward(function)
    found = [
        generation.AutoGenerator(batch_size=2, cuda_graphs=False, **UNSTOPPED),
        generation.ContinuousBatchingGenerator(batch_size=2, **UNSTOPPED),
        generation.HFGenerator(batch_size=2, cuda_graphs=False, **SAMPLING),
        generation.OpenAIServerGenerator(
            weight_sync=generation.OffPolicy(), model="served", **SERVER, **SAMPLING
        ),
        generation.VLLMGenerator(gpu_memory_utilization=0.5, **SAMPLING),
        rewards.CombinedReward({"a": classifier, "b": pairwise}, {"a": 1.0, "b": 0.5}),
        own,
        rewards.LengthPenalty(served, per_character=0.5),
        pairwise,
        rewards.PairwiseReward(rewards.FunctionJudge(function)),
        classifier,
        served,
        rewards.ServerReward(format=rewards.SGLangClassify("tokenizer", batch_size=3), **SERVER),
        rewards.ServerReward(format=rewards.VLLMPooling("served"), **SERVER),
        rewards.TorchmetricsReward(BLEUScore(n_gram=2), scale=0.01),
    ]
    return {f"{number} {type(component).__name__}": component for number, component in enumerate(found)}
