"""The figure of a study: what each arm gained, with intervals and seeds."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

from sppo_lightning.study.definition import Study


def gains_figure(study: Study, arms: Sequence[dict[str, object]]) -> bytes | None:
    """Return the gains with their intervals and seeds as SVG; ``None``: nothing to draw, or matplotlib is not there."""
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError:
        return None
    settings = [name for name in study.settings if any(row["setting"] == name for row in arms)]
    if not settings:
        return None
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": study.name}):
        figure = Figure(figsize=(4 + 3.5 * len(settings), 1.2 + 0.34 * len(study.arms)), layout="constrained")
        axes = figure.subplots(1, len(settings), squeeze=False, sharey=True)[0]
        names = list(study.arms)
        for axis, setting in zip(axes, settings, strict=True):
            axis.axvline(0, color="0.6", linewidth=1)
            for row in arms:
                if row["setting"] != setting:
                    continue
                height = len(names) - 1 - names.index(str(row["arm"]))
                gain, low, high = (float(str(row[name])) for name in ("gain", "low", "high"))
                gains = row["gains"]
                assert isinstance(gains, list)
                axis.plot(gains, [height] * len(gains), "|", color="0.35", markersize=9)
                if not math.isnan(low):
                    axis.plot([low, high], [height, height], "-", color="tab:blue", linewidth=2)
                axis.plot([gain], [height], "o", color="tab:blue")
            axis.set_title(_plain(setting))
            axis.set_xlabel("gain in held-out reward")
            axis.set_yticks(range(len(names)), [_plain(study.title(name)) for name in reversed(names)])
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def _plain(title: str) -> str:
    """Return a title as matplotlib shows it as it stands: a dollar would begin a formula."""
    return title.replace("$", r"\$")
