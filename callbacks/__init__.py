"""Lightning callbacks; the folder lies at the repository's root and is imported as ``b3_lightning.callbacks``."""

if __name__ != "b3_lightning.callbacks":
    raise ImportError(f"import this folder as b3_lightning.callbacks, not as {__name__}")

from b3_lightning.callbacks.clock import Clock as Clock
from b3_lightning.callbacks.embedding_writer import EmbeddingWriter as EmbeddingWriter
from b3_lightning.callbacks.export import Export as Export
from b3_lightning.callbacks.hardness_monitor import HardnessMonitor as HardnessMonitor
from b3_lightning.callbacks.keep_ranks import KeepRanks as KeepRanks
from b3_lightning.callbacks.mining_report import MiningReport as MiningReport
from b3_lightning.callbacks.remine import Remine as Remine
from b3_lightning.callbacks.requeue import Requeue as Requeue
from b3_lightning.callbacks.terminate_on_nan import TerminateOnNaN as TerminateOnNaN
