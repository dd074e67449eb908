"""Convert a GGUF file into a Hugging Face folder of plain safetensors weights.

    python tools/convert_gguf.py model.gguf out_folder [--dtype bf16] [--tie]

Quantised weights are unpacked, so the folder holds a dense model; it keeps the rounding of the quantised file.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

DTYPES = ("bf16", "fp16", "fp32")


def convert(source: Path, *, target: Path, dtype: str = "bf16", tie: bool = False) -> None:
    """Write `target`, a folder that `AutoModelForCausalLM.from_pretrained` loads, from the GGUF file `source`.

    tie: make one weight of embedding and head (the head's values are kept), for files that store a tied model twice.
    Raises FileExistsError when `target` exists, ValueError when the result has a non-finite weight.
    """
    if target.exists():
        raise FileExistsError(f"{target} exists: remove it or name another folder")
    # Imported here so that --help and the catalogue do not wait for transformers.
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    torch_dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
    folder, name = str(source.parent), source.name
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder,
        gguf_file=name,
        dtype=torch_dtype,
        # Without this the model counts as quantised and refuses to be saved.
        quantization_config=GgufConfig(gguf_file=name, dequantize=True),
    )
    if tie:
        head = model.get_output_embeddings().weight
        model.get_input_embeddings().weight.data.copy_(head.data)
        model.config.tie_word_embeddings = True
        model.tie_weights()
    for parameter_name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise ValueError(f"{source}: {parameter_name} has non-finite values after conversion to {dtype}")
    _forget_quantization(model)
    # GGUF files carry no length limit of the tokenizer; without one nothing warns about rows beyond the positions.
    tokenizer.model_max_length = model.config.max_position_embeddings
    part = target.with_name(target.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    model.save_pretrained(part)
    tokenizer.save_pretrained(part)
    for path in part.iterdir():
        path.chmod(0o644)
    _check_config(part)
    part.rename(target)


def _forget_quantization(model: Any) -> None:
    """Remove every record that the weights were once quantised; they are dense now."""
    for owner, name in ((model, "hf_quantizer"), (model, "quantization_method"), (model.config, "quantization_config")):
        if getattr(owner, name, None) is not None:
            delattr(owner, name)
    model.is_quantized = False


def _check_config(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in config, "the saved config still claims quantised weights"
    assert (folder / "tokenizer_config.json").exists()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="the .gguf file")
    parser.add_argument("target", type=Path, help="folder to create; it must not exist")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="dtype of the weights on disk (default bf16)")
    parser.add_argument("--tie", action="store_true", help="tie embedding and head, keeping the head's values")
    arguments = parser.parse_args(argv)
    if not arguments.source.is_file():
        print(f"convert_gguf: {arguments.source} is not a file", file=sys.stderr)
        return 2
    try:
        convert(arguments.source.resolve(), target=arguments.target, dtype=arguments.dtype, tie=arguments.tie)
    except (FileExistsError, ValueError) as error:
        print(f"convert_gguf: {error}", file=sys.stderr)
        return 2
    print(f"wrote {arguments.target}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
