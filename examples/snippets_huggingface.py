"""A small BERT learns which package of the standard library four lines of source are from.

    python examples/snippets_huggingface.py
    torchrun --nproc-per-node 2 examples/snippets_huggingface.py

Both runs train on the same number of samples; the pruned one trains on those with high scores.
"""

import gc
import tempfile

import torch
import torch.distributed as dist
import typer
from stdlib_text import LENGTH, PACKAGES, WORDS, Snippets, snippets
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    EvalPrediction,
    PrinterCallback,
    TrainingArguments,
    set_seed,
)
from transformers.utils import logging

from emp_fast import Pruner
from emp_fast.integrations.huggingface import PrunedTrainer


def main(prune_rate: float = 0.5, epochs: int = 4, quick: bool = False) -> None:
    """Trains from scratch twice and prints what it learnt."""
    logging.set_verbosity_error()
    train_set, test_set = (rows(part) for part in snippets(50 if quick else 1000))
    for rate in (0.0, prune_rate):
        train(train_set, test_set, rate, round(epochs / (1 - rate)))
    if dist.is_initialized():
        gc.collect()  # frees the trainers, whose models hold the process group
        dist.destroy_process_group()


def rows(part: Snippets) -> list[dict]:
    """Rows such as a tokenizer would produce."""
    return [
        {"input_ids": words, "label": label}
        for words, label in zip(part.words, part.labels, strict=True)
    ]


def collate(features: list[dict]) -> dict[str, Tensor]:
    """Pads to the longest of the batch."""
    words = [torch.tensor(feature["input_ids"]) for feature in features]
    input_ids = pad_sequence(words, batch_first=True)
    labels = torch.tensor([feature["label"] for feature in features])
    return {"input_ids": input_ids, "attention_mask": (input_ids != 0).long(), "labels": labels}


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """The share of snippets whose package is predicted correctly."""
    return {"accuracy": (prediction.predictions.argmax(-1) == prediction.label_ids).mean()}


def train(train_set: list[dict], test_set: list[dict], prune_rate: float, epochs: int) -> None:
    """Runs one training, on all ranks."""
    set_seed(0)
    config = BertConfig(
        vocab_size=WORDS,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=LENGTH,
        num_labels=len(PACKAGES),
    )
    pruner = Pruner(len(train_set), prune_rate)
    with tempfile.TemporaryDirectory() as folder:
        trainer = PrunedTrainer(
            BertForSequenceClassification(config),
            TrainingArguments(
                folder,
                per_device_train_batch_size=32,
                num_train_epochs=epochs,
                learning_rate=1e-3,
                use_cpu=True,
                report_to=[],
                save_strategy="no",
                logging_strategy="no",
                disable_tqdm=True,
            ),
            data_collator=collate,
            train_dataset=train_set,
            eval_dataset=test_set,
            compute_metrics=accuracy,
            pruner=pruner,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        measured = trainer.evaluate()["eval_accuracy"]
    pruner.merge()  # now every rank knows the samples of all ranks
    if trainer.is_world_process_zero():
        print(
            f"pruned {prune_rate:4.0%}  samples {pruner.store.rows_seen}  accuracy {measured:.3f}"
        )


if __name__ == "__main__":
    typer.run(main)
