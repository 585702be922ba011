"""Several ranks: replicated state and its merge, and state that is sharded over ranks."""

from emp_fast.distributed.sharded_store import ShardedScoreStore

__all__ = ["ShardedScoreStore"]
