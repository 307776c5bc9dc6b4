"""A run's policy, or its pairs, as a folder that leaves the project: ``sppo-lightning export``, and a class a format.

The base is the one that an adapter's own folder names. A folder is written under a temporary name and read back: it
must give the trained policy's log-probs of the run's own responses, as the base must give those that training stored
where it was the reference. A folder that fails the check keeps the temporary name. What is compared is the same for
all formats; an :class:`Exporter` says which runs it refuses, writes, reads back, and says how its folder is loaded.

Pairs leave as a data set without any model being loaded, by a :class:`DataExporter`.
"""

from sppo_lightning.export.exporter import DataExporter, Exporter, ExportFormat
from sppo_lightning.export.finished_run import FinishedRun
from sppo_lightning.export.formats import GGUFReadyModel, HFModel, MergedModel, PEFTAdapter
from sppo_lightning.export.preferences import PreferenceData
from sppo_lightning.export.saved_policy import SavedPolicy
from sppo_lightning.export.stored_run import StoredRun

__all__ = [
    "DataExporter",
    "ExportFormat",
    "Exporter",
    "FinishedRun",
    "GGUFReadyModel",
    "HFModel",
    "MergedModel",
    "PEFTAdapter",
    "PreferenceData",
    "SavedPolicy",
    "StoredRun",
]
