"""The report as Markdown, for CI: tables of numbers, no texts of prompts or responses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sppo_lightning.text import for_markdown

Cells = Sequence[str]


def markdown(summary: Mapping[str, Any]) -> str:
    """Return a report's summary as Markdown."""
    blocks = [] if summary["study"] is None else list(_study(summary["study"]))
    blocks += [block for run in summary["runs"] for block in _run(run, summary)]
    if summary["comparison"] is not None:
        blocks += _comparison(summary)
    return "\n\n".join(blocks) + "\n"


def _study(study: Mapping[str, Any]) -> Iterator[str]:
    runs = study["runs"]
    yield f"# {for_markdown(study['name'])}"
    yield for_markdown(study["question"])
    yield f"{runs['ended']} of {runs['all']} runs have ended, {runs['failed']} failed."
    if study["missing"]:
        yield _missing(study["missing"])
    for setting in study["settings"]:
        yield f"## {for_markdown(setting['name'])}"
        heads = ["arm", "seeds", "gain, 95 % interval", "win rate", "length", "tokens sampled"]
        rows = [
            [
                row["title"],
                str(row["seeds"]),
                _interval(row["gain"], row["low"], row["high"]),
                *(_number(row[name]) for name in ("win_rate", "length_ratio")),
                "-" if row["tokens"] is None else f"{row['tokens']:,.0f}",
            ]
            for row in setting["arms"]
        ]
        yield _table(heads, rows)
    if study["claims"]:
        yield "## Claims"
        heads = ["claim", "setting", "reading", "difference, 95 % interval", "p", "verdict"]
        rows = [
            [
                *(row[name] for name in ("text", "setting", "reading")),
                _interval(row["mean"], row["low"], row["high"]),
                _number(row["p_holm"]),
                row["verdict"],
            ]
            for row in study["claims"]
        ]
        yield _table(heads, rows)
    if study["shown"] is not None:
        yield f"Below: the runs of {for_markdown(study['shown'])}; {study['left_out']} that have ended are left out."


def _run(run: Mapping[str, Any], summary: Mapping[str, Any]) -> Iterator[str]:
    planned = "" if run["planned"] is None else f" of {run['planned']}"
    yield f"# {for_markdown(run['name'])}"
    facts = [f"{run['finished']}{planned} iterations finished"]
    if run["seed"] is not None:
        facts.append(f"seed {run['seed']}")
    if run["started"]:
        start = run["starts"][0]
        facts.append(
            f"started {start['time']} on {start.get('device')}, {start.get('processes')} process(es)"
        )
    yield for_markdown(", ".join(facts)) + "."
    if run["missing"]:
        yield _missing(run["missing"])
    if run["held_out"]:
        yield f"## Held-out prompts ({run['held_out_prompts']})"
        names = [
            name for name in summary["measures"] if any(name in one["measures"] for one in run["held_out"])
        ]
        titles = [f"{summary['measures'][name]['title']}{_unit(summary['measures'][name])}" for name in names]
        rows = [
            [
                _policy(one["finished"]),
                *(_estimate(one["measures"].get(name), summary, name) for name in names),
            ]
            for one in run["held_out"]
        ]
        yield _table(["policy", *titles], rows)
        yield f"± is {summary['interval']} standard errors over prompts."
    yield from _iterations(run)
    if run["gain_by_quartile"]:
        found = run["gain_by_quartile"]
        yield f"## Gain by difficulty quartile, iteration {found['before']} to {found['after']}"
        yield _table(
            ["quartile", "gain", "prompts"],
            [
                [name, _mean(gain, summary["interval"]), str(gain["size"])]
                for name, gain in zip(summary["quartiles"], found["gains"], strict=True)
            ],
        )
    if run["decisions"]:
        yield "## Decisions of the gate"
        yield _table(
            ["after", "decision", "best", "learning rate, factor", "reasons"],
            [
                [
                    f"{one['finished']} iteration(s)",
                    one["action"],
                    _policy(one["best"]),
                    f"{one['learning_rate_factor']:g}",
                    "; ".join(one["reasons"]),
                ]
                for one in run["decisions"]
            ],
        )


def _iterations(run: Mapping[str, Any]) -> Iterator[str]:
    if not run["iterations"]:
        return
    seconds: dict[int, float] = {}
    for one in run["phases"]:
        seconds[one["iteration"]] = seconds.get(one["iteration"], 0.0) + (one["seconds"] or 0.0)
    yield "## Iterations"
    rows = []
    for one in run["iterations"]:
        metrics, number = one["metrics"], one["iteration"]
        quartiles = [metrics.get(f"iteration/difficulty/q{name}") for name in (25, 50, 75)]
        lost = ", ".join(f"{count} {name}" for name, count in one["outcomes"].items() if name != "paired")
        rows.append(
            [
                f"{number}" if one["complete"] else f"{number} (in progress)",
                _number(metrics.get("iteration/reward/mean")),
                " / ".join(map(_number, quartiles)),
                str(one["outcomes"].get("paired", 0)),
                lost,
                f"{seconds[number]:,.0f}" if seconds.get(number) else "",
            ]
        )
    heads = [
        "iteration",
        "reward",
        "difficulty q25 / q50 / q75",
        "prompts with a pair",
        "without, by reason",
        "s",
    ]
    yield _table(heads, rows)


def _comparison(summary: Mapping[str, Any]) -> Iterator[str]:
    names = [run["name"] for run in summary["runs"]]
    found = summary["comparison"]
    yield f"# Against {for_markdown(names[0])}"
    if found["differences"]:
        yield _table(
            ["run", "after", "reward", "win rate", "tokens"],
            [
                [
                    names[one["run"]],
                    f"{one['finished']} iteration(s)",
                    _mean(one["reward"], summary["interval"]),
                    _share(one["win_rate"], summary["interval"]),
                    _mean(one["length"], summary["interval"], digits=1),
                ]
                for one in found["differences"]
            ],
        )
    else:
        yield "No held-out answers to compare yet."
    if found["settings"]:
        yield "## Settings that differ"
        rows = [
            [key, *("" if item is None else str(item) for item in values)]
            for key, values in found["settings"].items()
        ]
        yield _table(["setting", *names], rows)


def _missing(texts: Sequence[str]) -> str:
    return "What is missing:\n\n" + "\n".join(f"- {for_markdown(text)}" for text in texts)


def _interval(mean: float | None, low: float | None, high: float | None) -> str:
    if mean is None or low is None or high is None:
        return "-" if mean is None else f"{mean:+.3f}"
    return f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]"


def _policy(finished: int) -> str:
    return f"after {finished} iteration(s)" if finished else "initial policy"


def _unit(measure: Mapping[str, str]) -> str:
    return "" if measure["unit"] in ("reward", "share") else f" ({measure['unit']})"


def _estimate(found: Mapping[str, Any] | None, summary: Mapping[str, Any], name: str) -> str:
    if found is None:
        return ""
    unit = summary["measures"][name]["unit"]
    if unit == "share":
        return _share(found, summary["interval"])
    return _mean(found, summary["interval"], digits=1 if unit == "tokens" else 3, signed=name == "gain")


def _mean(found: Mapping[str, Any], interval: float, *, digits: int = 3, signed: bool = True) -> str:
    if found["mean"] is None:
        return ""
    error = "" if found["stderr"] is None else f" ± {interval * found['stderr']:.{digits}f}"
    return f"{found['mean']:{'+' if signed else ''}.{digits}f}{error}"


def _share(found: Mapping[str, Any], interval: float) -> str:
    if found["mean"] is None:
        return ""
    error = "" if found["stderr"] is None else f" ± {interval * found['stderr']:.1%}"
    return f"{found['mean']:.1%}{error}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _table(heads: Cells, rows: Sequence[Cells]) -> str:
    lines = [heads, ["---"] * len(heads), *([for_markdown(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
