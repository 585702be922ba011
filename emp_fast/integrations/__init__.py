"""The pruner in common training libraries; each module imports only its own library.

    emp_fast.integrations.huggingface    PrunedTrainer, and PrunerMixin for other Trainers
    emp_fast.integrations.lightning      PrunerCallback
    emp_fast.integrations.accelerate     prepare_loader

Plain DDP needs none of this: `Pruner.distributed_sampler` shards the epoch.
"""
