"""A GGUF file becomes a dense folder with the same function."""

from pathlib import Path

import convert_gguf
import pytest

gguf = pytest.importorskip("gguf", reason="the extra `gguf` is not installed")


def _write_gguf(path: Path, *, tied: bool) -> dict[str, object]:
    """A one-layer Llama with random float32 weights; returns the tensors by their GGUF names."""
    import numpy as np

    random = np.random.default_rng(0)
    width, inner, vocab = 32, 64, 300
    shapes = {
        "token_embd.weight": (vocab, width),
        "output_norm.weight": (width,),
        "blk.0.attn_norm.weight": (width,),
        "blk.0.ffn_norm.weight": (width,),
        "blk.0.attn_q.weight": (width, width),
        "blk.0.attn_k.weight": (width, width),
        "blk.0.attn_v.weight": (width, width),
        "blk.0.attn_output.weight": (width, width),
        "blk.0.ffn_gate.weight": (inner, width),
        "blk.0.ffn_up.weight": (inner, width),
        "blk.0.ffn_down.weight": (width, inner),
    }
    if not tied:
        shapes["output.weight"] = (vocab, width)
    tensors = {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(128)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_rope_dimension_count(width // 2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(vocab)
    letters = ["t", "1", "t1", *(f"x{index}" for index in range(vocab - 6))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(["<|endoftext|>", "<|im_start|>", "<|im_end|>", *letters])
    writer.add_token_types([3, 3, 3, *([1] * len(letters))])
    writer.add_token_merges(["t 1"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


@pytest.mark.parametrize("tie", [False, True])
def test_weights_arrive_and_load_as_a_plain_model(tmp_path: Path, tie: bool) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tensors = _write_gguf(tmp_path / "m.gguf", tied=False)
    arguments = [str(tmp_path / "m.gguf"), str(tmp_path / "out"), "--dtype", "fp32", *(["--tie"] if tie else [])]
    assert convert_gguf.main(arguments) == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    head = torch.from_numpy(tensors["output.weight"])
    assert torch.equal(model.lm_head.weight, head)
    assert torch.equal(model.model.embed_tokens.weight, head) is tie
    assert model.config.tie_word_embeddings is tie
    assert not hasattr(model.config, "quantization_config")
    assert model.config.rope_parameters["rope_type"] == "default"
    assert AutoTokenizer.from_pretrained(tmp_path / "out").model_max_length == 128


def test_bad_arguments_are_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert convert_gguf.main([str(tmp_path / "absent.gguf"), str(tmp_path / "out")]) == 2
    assert "is not a file" in capsys.readouterr().err
    (tmp_path / "m.gguf").touch()
    (tmp_path / "out").mkdir()
    assert convert_gguf.main([str(tmp_path / "m.gguf"), str(tmp_path / "out")]) == 2
    assert "exists" in capsys.readouterr().err
