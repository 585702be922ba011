"""The pruner inside the trainers that people use; each module imports its library and no other.

    emp_fast.integrations.huggingface    PrunedTrainer, and PrunerMixin for other Trainers
    emp_fast.integrations.lightning      PrunerCallback
    emp_fast.integrations.accelerate     prepare_loader

Plain DDP needs nothing of this: `Pruner.distributed_sampler` shards the epoch.
"""
