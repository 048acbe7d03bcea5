"""From a teacher's vectors to batches of hard negatives: pure functions on tensors, no trainer, no logger."""

from b3_lightning.mining.alike import Alike as Alike
from b3_lightning.mining.alike import KnownTargets as KnownTargets
from b3_lightning.mining.alike import equal as equal
from b3_lightning.mining.alike import keys_of as keys_of
from b3_lightning.mining.alike import listed as listed
from b3_lightning.mining.alike import within_tasks as within_tasks
from b3_lightning.mining.batches import BatchPlan as BatchPlan
from b3_lightning.mining.batches import HandOver as HandOver
from b3_lightning.mining.batches import random_clusters as random_clusters
from b3_lightning.mining.neighbors import Progress as Progress
from b3_lightning.mining.pipeline import help_mine as help_mine
from b3_lightning.mining.pipeline import mine as mine
from b3_lightning.mining.plan import MinedPlan as MinedPlan
from b3_lightning.mining.plan import rows_of_task as rows_of_task
from b3_lightning.mining.settings import MiningSettings as MiningSettings
from b3_lightning.mining.stages import PATIENCE as PATIENCE
from b3_lightning.mining.stages import PeerError as PeerError
from b3_lightning.mining.stages import Processes as Processes
from b3_lightning.mining.stages import Stages as Stages
from b3_lightning.mining.stages import fingerprint as fingerprint
