"""Where a run's metrics, tables and histograms go, in addition to ``metrics.csv``.

Lightning's loggers write metrics. What is added here: :class:`TrackioLogger`, since Lightning has none; ``media``, how
each known logger is given a table or a histogram; ``settings``, what of a logger's settings is refused before a run
starts; ``runs``, which run of a tracker a resumed run goes on with.
"""

from sppo_lightning.loggers.trackio import TrackioLogger

__all__ = ["TrackioLogger"]
