"""emp_fast: fast, drop-in scoring and selection for dynamic data pruning.

    pruner = emp_fast.Pruner(len(train_set), prune_rate=0.7)
    loader = DataLoader(emp_fast.with_indices(train_set), batch_size=128, sampler=pruner.sampler)
    ...
    loss = pruner.loss(model(x), y, idx)

Importing the package builds and loads nothing native.
"""

from emp_fast import functional
from emp_fast._warnings import EmpFastWarning
from emp_fast.backends import BackendError, use_backend
from emp_fast.functional import SampleStats

__version__ = "0.1.0"

__all__ = [
    "BackendError",
    "EmpFastWarning",
    "SampleStats",
    "functional",
    "use_backend",
]
