"""A small GPT-2 learns to write like Python's language reference, byte by byte.

    python examples/manual_huggingface.py
    torchrun --nproc-per-node 2 examples/manual_huggingface.py

The paragraphs of a batch are packed into one row without padding. Both runs train on the same
number of paragraphs; the pruned one trains on those with high scores.
"""

import gc
import tempfile

import torch.distributed as dist
import typer
from stdlib_text import paragraphs
from transformers import (
    DataCollatorWithFlattening,
    GPT2Config,
    GPT2LMHeadModel,
    PrinterCallback,
    TrainingArguments,
    set_seed,
)
from transformers.utils import logging

from emp_fast import Pruner
from emp_fast.integrations.huggingface import PrunedTrainer

LONGEST = 96  # maximum bytes of a paragraph


def main(prune_rate: float = 0.3, epochs: int = 3, quick: bool = False) -> None:
    """Trains from scratch twice and prints what it learnt."""
    logging.set_verbosity_error()
    train_set, test_set = (
        [{"input_ids": list(text)} for text in part] for part in paragraphs(LONGEST)
    )
    train_set = train_set[: 64 if quick else 1000]
    for rate in (0.0, prune_rate):
        train(train_set, test_set[:50], rate, round(epochs / (1 - rate)))
    if dist.is_initialized():
        gc.collect()  # frees the trainers, whose models hold the process group
        dist.destroy_process_group()


def train(train_set: list[dict], test_set: list[dict], prune_rate: float, epochs: int) -> None:
    """Runs one training, on all ranks."""
    set_seed(0)
    config = GPT2Config(
        vocab_size=256,
        n_positions=LONGEST,
        n_embd=64,
        n_layer=2,
        n_head=4,
        bos_token_id=None,
        eos_token_id=None,
    )
    pruner = Pruner(len(train_set), prune_rate)
    with tempfile.TemporaryDirectory() as folder:
        trainer = PrunedTrainer(
            GPT2LMHeadModel(config),
            TrainingArguments(
                folder,
                per_device_train_batch_size=8,
                gradient_accumulation_steps=2,
                num_train_epochs=epochs,
                learning_rate=3e-3,
                use_cpu=True,
                report_to=[],
                save_strategy="no",
                logging_strategy="no",
                disable_tqdm=True,
            ),
            data_collator=DataCollatorWithFlattening(),
            train_dataset=train_set,
            eval_dataset=test_set,
            pruner=pruner,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        loss = trainer.evaluate()["eval_loss"]
    pruner.merge()  # now every rank knows the samples of all ranks
    if trainer.is_world_process_zero():
        seen = pruner.store.rows_seen
        print(f"pruned {prune_rate:4.0%}  paragraphs {seen}  loss {loss:.3f} nats a byte")


if __name__ == "__main__":
    typer.run(main)
