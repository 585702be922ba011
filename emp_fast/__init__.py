"""emp_fast: fast, drop-in scoring and selection for dynamic data pruning.

    pruner = emp_fast.Pruner(len(train_set), prune_rate=0.7)
    loader = DataLoader(emp_fast.with_indices(train_set), batch_size=128, sampler=pruner.sampler)
    ...
    loss = pruner.loss(model(x), y, idx)

Importing the package builds and loads nothing native.
"""

from emp_fast import functional, policies, rules
from emp_fast._warnings import EmpFastWarning
from emp_fast.backends import BackendError, use_backend
from emp_fast.checkpoints import load_checkpoint, save_checkpoint
from emp_fast.data import collate_with_indices, with_indices
from emp_fast.distributed import ShardedScoreStore
from emp_fast.files import FileProblem
from emp_fast.functional import SampleStats
from emp_fast.in_batch import select_in_batch
from emp_fast.policies import Policy
from emp_fast.pruner import Pruner
from emp_fast.rules import Rule
from emp_fast.selection import Selection
from emp_fast.static import score_dataset
from emp_fast.store import ScoreStore

__version__ = "0.1.0"

__all__ = [
    "BackendError",
    "EmpFastWarning",
    "FileProblem",
    "Policy",
    "Pruner",
    "Rule",
    "SampleStats",
    "ScoreStore",
    "Selection",
    "ShardedScoreStore",
    "collate_with_indices",
    "functional",
    "load_checkpoint",
    "policies",
    "rules",
    "save_checkpoint",
    "score_dataset",
    "select_in_batch",
    "use_backend",
    "with_indices",
]
