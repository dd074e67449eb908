"""Tiny models and batches that tests share. Nothing here needs a network or a tokenizer."""

from collections.abc import Sequence
from pathlib import Path

import torch

from largekd.contracts import IGNORE_LABEL, Batch, Segment

VOCAB = 101
LENGTH = 24


def save_tiny_llama(
    folder: Path,
    *,
    seed: int,
    layers: int = 2,
    hidden: int = 32,
    vocab: int = VOCAB,
    tied: bool = True,
    heads: int = 4,
    key_heads: int = 2,
) -> Path:
    """A random Llama in a Hugging Face folder; weights large enough that its distributions are far from uniform."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        pad_token_id=2,
        initializer_range=0.1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def make_rows(*, count: int, packed: bool, seed: int = 0, vocab: int = VOCAB, length: int = LENGTH) -> list[Batch]:
    """Single-row batches with uneven masks: some rows have one counted token, some have none, weights differ."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for index in range(count):
        ids = torch.randint(3, vocab, (1, length), generator=generator)
        labels = torch.randint(3, vocab, (1, length), generator=generator)
        counted = torch.rand((1, length), generator=generator) < (0.0, 0.05, 0.4, 0.9)[index % 4]
        weight = torch.where(torch.rand((1, length), generator=generator) < 0.5, 1.0, 0.25)
        used = length - 3 * (index % 3)
        counted[:, used:] = False
        labels = labels.masked_fill(~counted, IGNORE_LABEL)
        split = 5 + index % 7
        positions = torch.cat([torch.arange(split), torch.arange(used - split), torch.arange(length - used)])
        rows.append(
            Batch(
                input_ids_BS=ids,
                labels_BS=labels,
                token_weight_BS=weight,
                counted_T=counted.flatten().nonzero().flatten(),
                attention_mask_BS=None if packed else (torch.arange(length) < used).long()[None],
                position_ids_BS=positions[None] if packed else None,
                segments=((Segment(index, 0, used),),),
            )
        )
    return rows


def join_rows(rows: Sequence[Batch]) -> Batch:
    """One batch of several single-row batches."""

    def cat(name: str) -> torch.Tensor | None:
        values = [getattr(row, name) for row in rows]
        return None if values[0] is None else torch.cat(values)

    length = rows[0].input_ids_BS.shape[1]
    return Batch(
        input_ids_BS=torch.cat([row.input_ids_BS for row in rows]),
        labels_BS=torch.cat([row.labels_BS for row in rows]),
        token_weight_BS=torch.cat([row.token_weight_BS for row in rows]),
        counted_T=torch.cat([row.counted_T + index * length for index, row in enumerate(rows)]),
        attention_mask_BS=cat("attention_mask_BS"),
        position_ids_BS=cat("position_ids_BS"),
        segments=tuple(segments for row in rows for segments in row.segments),
    )
