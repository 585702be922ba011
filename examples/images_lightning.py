"""Lightning on scikit-learn's digits, with and without pruning.

    python examples/images_lightning.py
    torchrun --nproc-per-node 2 examples/images_lightning.py

Both runs train on the same number of samples; the pruned one trains on those with high scores.
"""

import os

import lightning
import torch
import torch.distributed as dist
import typer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import emp_fast
from emp_fast.demo.datasets import ImageData, load
from emp_fast.integrations.lightning import PrunerCallback


class Classifier(lightning.LightningModule):
    """A small network whose loss scores its samples."""

    def __init__(self, pruner: emp_fast.Pruner) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
        self.pruner = pruner

    def training_step(self, batch: list, _: int) -> torch.Tensor:
        """The only difference: samples come with their indices, and the pruner makes the loss."""
        (images, labels), indices = batch
        return self.pruner.loss(self.net(images), labels, indices)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """As without pruning."""
        return torch.optim.AdamW(self.parameters(), 3e-3)


def main(prune_rate: float = 0.5, epochs: int = 10, quick: bool = False) -> None:
    """Trains a small network twice and prints what it learnt."""
    digits = load("digits")
    for rate in (0.0, prune_rate):
        train(digits, rate, round((3 if quick else epochs) / (1 - rate)))
    if dist.is_initialized():
        dist.destroy_process_group()


def train(digits: ImageData, prune_rate: float, epochs: int) -> None:
    """Runs one training, on all ranks."""
    lightning.seed_everything(0, verbose=False)
    train_set = TensorDataset(digits.train_images, digits.train_labels)
    pruner = emp_fast.Pruner(len(train_set), prune_rate)
    loader = DataLoader(
        emp_fast.with_indices(train_set), batch_size=32, sampler=pruner.distributed_sampler()
    )
    model = Classifier(pruner)
    trainer = lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        devices=int(os.environ.get("WORLD_SIZE", 1)),
        callbacks=[PrunerCallback(pruner)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, loader)

    pruner.merge()  # now every rank knows the samples of all ranks
    if trainer.is_global_zero:
        predicted = model.net(digits.test_images).argmax(1)
        accuracy = (predicted == digits.test_labels).float().mean().item()
        print(
            f"pruned {prune_rate:4.0%}  samples {pruner.store.rows_seen}  accuracy {accuracy:.3f}"
        )


if __name__ == "__main__":
    typer.run(main)
