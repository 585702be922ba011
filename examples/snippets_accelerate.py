"""Accelerate learns which package of the standard library four lines of source are from.

    python examples/snippets_accelerate.py
    torchrun --nproc-per-node 2 examples/snippets_accelerate.py

Both runs train on the same number of samples; the pruned one trains on those with high scores.
"""

import torch
import torch.distributed as dist
import typer
from accelerate import Accelerator
from stdlib_text import PACKAGES, WORDS, Snippets, snippets
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, TensorDataset

import emp_fast
from emp_fast.integrations.accelerate import prepare_loader


class BagOfWords(nn.Module):
    """Two layers on the mean of the word vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.EmbeddingBag(WORDS, 64, padding_idx=0)
        self.head = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, len(PACKAGES)))

    def forward(self, words: Tensor) -> Tensor:
        """[S, T] word ids to [S, C] logits."""
        return self.head(self.words(words))


def main(prune_rate: float = 0.5, epochs: int = 5, quick: bool = False) -> None:
    """Trains a bag of words twice and prints what it learnt."""
    train_set, test_set = (tensors(part) for part in snippets(200 if quick else 1000))
    for rate in (0.0, prune_rate):
        train(train_set, test_set, rate, round(epochs / (1 - rate)))
    if dist.is_initialized():
        dist.destroy_process_group()


def tensors(part: Snippets) -> TensorDataset:
    """Word ids, padded with 0, and labels."""
    words = pad_sequence([torch.tensor(words) for words in part.words], batch_first=True)
    return TensorDataset(words, torch.tensor(part.labels))


def train(
    train_set: TensorDataset, test_set: TensorDataset, prune_rate: float, epochs: int
) -> None:
    """Runs one training, on all ranks."""
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True)
    net = BagOfWords()
    model, optimizer = accelerator.prepare(net, torch.optim.AdamW(net.parameters(), 3e-3))

    pruner = emp_fast.Pruner(len(train_set), prune_rate)
    loader = DataLoader(emp_fast.with_indices(train_set), batch_size=32, sampler=pruner.sampler)
    loader = prepare_loader(accelerator, pruner, loader)
    for _ in range(epochs):
        for (words, labels), indices in loader:
            loss = pruner.loss(model(words), labels, indices)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()

    pruner.merge()  # now every rank knows the samples of all ranks
    words, labels = test_set.tensors
    accuracy = (net(words).argmax(1) == labels).float().mean().item()
    accelerator.print(
        f"pruned {prune_rate:4.0%}  samples {pruner.store.rows_seen}  accuracy {accuracy:.3f}"
    )


if __name__ == "__main__":
    typer.run(main)
