"""DistributedDataParallel on scikit-learn's digits, with and without pruning.

    python examples/images_ddp.py
    torchrun --nproc-per-node 2 examples/images_ddp.py

Both runs train on the same number of samples; the pruned one trains on those with high scores.
"""

import torch
import torch.distributed as dist
import typer
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

import emp_fast
from emp_fast.demo.datasets import ImageData, load


def main(prune_rate: float = 0.5, epochs: int = 10, quick: bool = False) -> None:
    """Trains a small network twice and prints what it learnt."""
    if dist.is_torchelastic_launched():
        dist.init_process_group("gloo")
    digits = load("digits")
    for rate in (0.0, prune_rate):
        train(digits, rate, round((3 if quick else epochs) / (1 - rate)))
    if dist.is_initialized():
        dist.destroy_process_group()


def train(digits: ImageData, prune_rate: float, epochs: int) -> None:
    """Runs one training, on all ranks."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    model = DistributedDataParallel(net) if dist.is_initialized() else net
    optimizer = torch.optim.AdamW(net.parameters(), 3e-3)

    train_set = TensorDataset(digits.train_images, digits.train_labels)
    pruner = emp_fast.Pruner(len(train_set), prune_rate)
    loader = DataLoader(
        emp_fast.with_indices(train_set), batch_size=32, sampler=pruner.distributed_sampler()
    )
    for _ in range(epochs):
        for (images, labels), indices in loader:
            loss = pruner.loss(model(images), labels, indices)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    pruner.merge()  # now every rank knows the samples of all ranks
    if not dist.is_initialized() or dist.get_rank() == 0:
        predicted = net(digits.test_images).argmax(1)
        accuracy = (predicted == digits.test_labels).float().mean().item()
        print(
            f"pruned {prune_rate:4.0%}  samples {pruner.store.rows_seen}  accuracy {accuracy:.3f}"
        )


if __name__ == "__main__":
    typer.run(main)
