"""Talk to a Hugging Face folder, for example an exported student.

    python tools/chat.py runs/quickstart/export
    python tools/chat.py runs/quickstart/export --prompt "What is 12 + 30?"

With a chat template the lines are a conversation; --raw, or a model without one, continues the text instead.
"""

import argparse
import sys
from pathlib import Path
from typing import Any


def _load(folder: str) -> tuple[Any, Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", use_safetensors=True)
    return model.to(device).eval(), AutoTokenizer.from_pretrained(folder)


def _reply(model: Any, tokenizer: Any, *, text: str, given: argparse.Namespace) -> str:
    """Print the continuation of `text` token by token and return it."""
    from transformers import TextStreamer

    # The template has written the special tokens that a conversation needs.
    inputs = tokenizer(text, return_tensors="pt", add_special_tokens=given.raw).to(model.device)
    output = model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=given.max_new_tokens,
        do_sample=given.temperature > 0,
        temperature=given.temperature if given.temperature > 0 else None,
        streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
    )
    return str(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


def _render(tokenizer: Any, *, messages: list[dict[str, str]], raw: bool) -> str:
    if raw:
        return messages[-1]["content"]
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", help="Hugging Face folder")
    parser.add_argument("--prompt", help="answer this once and stop; without it, read lines until end of file")
    parser.add_argument("--raw", action="store_true", help="continue the text instead of using the chat template")
    parser.add_argument("--max-new-tokens", type=int, default=200)
    parser.add_argument("--temperature", type=float, default=0.0, help="0: the most likely token (default)")
    given = parser.parse_args(argv)
    if not (Path(given.folder) / "config.json").is_file():
        print(f"chat: {given.folder} has no config.json: name a Hugging Face folder", file=sys.stderr)
        return 2
    model, tokenizer = _load(given.folder)
    given.raw = given.raw or tokenizer.chat_template is None
    messages: list[dict[str, str]] = []
    while True:
        try:
            line = given.prompt if given.prompt is not None else input("> ")
        except (EOFError, KeyboardInterrupt):
            return 0
        if line.strip():
            messages.append({"role": "user", "content": line})
            text = _render(tokenizer, messages=messages, raw=given.raw)
            messages.append({"role": "assistant", "content": _reply(model, tokenizer, text=text, given=given)})
        if given.prompt is not None:
            return 0


if __name__ == "__main__":
    sys.exit(main())
