"""Make a tiny random Llama with a tokenizer of its own, for smoke runs and tests; nothing is downloaded.

    python tools/make_tiny_model.py runs/smoke-assets/teacher --text runs/smoke-assets

The same arguments and seed give the same files. The text is generated arithmetic in words.
"""

import argparse
import json
import os
import random
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
NAMES = ("Ada", "Ben", "Chloe", "Dan", "Eva", "Finn", "Gina", "Hugo")
THINGS = ("apples", "books", "coins", "marbles", "pencils", "shells", "stamps", "tickets")


@dataclass(frozen=True)
class Shape:
    """Sizes of the model. A vocabulary has 256 bytes and three special tokens at least; what the tokenizer cannot fill,
    beyond about 490, are columns without a token, as large models have too."""

    layers: int = 4
    hidden: int = 64
    heads: int = 4
    kv_heads: int = 2
    vocab: int = 384
    positions: int = 512
    tied: bool = True
    # Wider than usual, so that a random teacher's distribution is far from uniform.
    init_std: float = 0.1


def make_text(*, samples: int, seed: int) -> list[dict[str, str]]:
    """`samples` records {"text": problem, empty line, solution} of additions and subtractions."""
    draw = random.Random(seed)
    records = []
    for _ in range(samples):
        name, other = draw.sample(NAMES, 2)
        thing = draw.choice(THINGS)
        start, change = draw.randint(20, 99), draw.randint(2, 19)
        gives = draw.random() < 0.5
        act = f"gives {change} of them to {other}" if gives else f"gets {change} more from {other}"
        sign, total = ("-", start - change) if gives else ("+", start + change)
        problem = f"{name} has {start} {thing} and {act}. How many {thing} does {name} have now?"
        solution = f"{name} starts with {start} {thing}. {start} {sign} {change} = {total}. The answer is {total}."
        records.append({"text": f"{problem}\n\n{solution}"})
    return records


def make_model(folder: Path, *, shape: Shape, seed: int) -> None:
    """Write model, tokenizer, generation config and chat template to `folder`, replacing what is there."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = _train_tokenizer(shape.vocab)
    config = LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.hidden * 3,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=shape.positions,
        tie_word_embeddings=shape.tied,
        initializer_range=shape.init_std,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    tokenizer.model_max_length = shape.positions
    part = folder.with_name(f"{folder.name}.part-{os.getpid()}")
    model.save_pretrained(part)
    tokenizer.save_pretrained(part)
    for path in part.iterdir():
        path.chmod(0o644)
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)


def _train_tokenizer(vocab: int) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator((record["text"] for record in make_text(samples=2000, seed=0)), trainer=trainer)
    end, start, stop = SPECIAL_TOKENS
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=start, eos_token=stop, pad_token=end)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _write(path: Path, *, records: list[dict[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    default = Shape()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="Hugging Face folder to write; an earlier one is replaced")
    parser.add_argument("--layers", type=int, default=default.layers)
    parser.add_argument("--hidden", type=int, default=default.hidden)
    parser.add_argument("--heads", type=int, default=default.heads)
    parser.add_argument("--kv-heads", type=int, default=default.kv_heads)
    parser.add_argument("--vocab", type=int, default=default.vocab, help="at least 259")
    parser.add_argument("--positions", type=int, default=default.positions)
    parser.add_argument("--init-std", type=float, default=default.init_std)
    parser.add_argument("--untied", action="store_true", help="a head of its own")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--text", type=Path, metavar="FOLDER", help="also write train.jsonl and eval.jsonl there")
    parser.add_argument("--samples", type=int, default=400, help="training records; eval has a tenth, at least 40")
    given = parser.parse_args(argv)
    if given.vocab < 259 or given.hidden % given.heads or given.heads % given.kv_heads:
        print("make_tiny_model: vocab >= 259, and heads divide hidden, and kv-heads divide heads", file=sys.stderr)
        return 2
    shape = Shape(
        layers=given.layers,
        hidden=given.hidden,
        heads=given.heads,
        kv_heads=given.kv_heads,
        vocab=given.vocab,
        positions=given.positions,
        tied=not given.untied,
        init_std=given.init_std,
    )
    given.folder.parent.mkdir(parents=True, exist_ok=True)
    make_model(given.folder, shape=shape, seed=given.seed)
    if given.text is not None:
        _write(given.text / "train.jsonl", records=make_text(samples=given.samples, seed=given.seed + 1))
        _write(given.text / "eval.jsonl", records=make_text(samples=max(40, given.samples // 10), seed=given.seed + 2))
    print(f"wrote {given.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
