"""Transformers small enough for a test, without dropout so that two runs can be compared."""

from __future__ import annotations

from typing import Any

import torch

VOCABULARY = 40
CLASSES = 3


def sentences(samples: int, seed: int = 0) -> list[list[int]]:
    """Random sequences of 1 to 12 tokens; token 0 is left for padding."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 13, (samples,), generator=generator).tolist()
    return [torch.randint(1, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]


def causal_lm() -> Any:
    """A GPT-2 of one layer; always the same weights."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=32,
        n_embd=16,
        n_layer=1,
        n_head=2,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=None,
        eos_token_id=None,
        use_cache=False,
    )
    return GPT2LMHeadModel(config)


def mixture_of_experts() -> Any:
    """A Mixtral of one layer, which adds the loss of its router; always the same weights."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=4,
        output_router_logits=True,
        router_aux_loss_coef=1.0,
        use_cache=False,
    )
    return MixtralForCausalLM(config)


def classifier(**config: Any) -> Any:
    """A BERT of one layer with `CLASSES` classes; always the same weights."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    defaults: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "max_position_embeddings": 32,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "num_labels": CLASSES,
    }
    return BertForSequenceClassification(BertConfig(**{**defaults, **config}))


def pad(features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Collates to [S, T]; labels of language models are the tokens, -100 in the padding."""
    longest = max(len(feature["input_ids"]) for feature in features)
    tokens = [f["input_ids"] + [0] * (longest - len(f["input_ids"])) for f in features]
    input_ids = torch.tensor(tokens)
    mask = (input_ids != 0).long()
    if "label" in features[0]:
        labels = torch.tensor([feature["label"] for feature in features])
    else:
        labels = torch.where(mask == 1, input_ids, -100)
    return {"input_ids": input_ids, "attention_mask": mask, "labels": labels}


def language_set(samples: int) -> list[dict[str, Any]]:
    """Samples for `causal_lm`."""
    return [{"input_ids": tokens} for tokens in sentences(samples)]


def labelled_set(samples: int) -> list[dict[str, Any]]:
    """Samples for `classifier`."""
    return [{"input_ids": tokens, "label": sum(tokens) % CLASSES} for tokens in sentences(samples)]
