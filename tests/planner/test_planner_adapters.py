"""The plan of a student with adapters: their size is that of the real ones, and they alone have optimizer state."""

import json

import pytest
import torch

from largekd.config.load import parse_config
from largekd.config.lora import LoraConfig
from largekd.errors import ConfigError
from largekd.planner.adapters import adapter_count
from largekd.planner.plan import plan
from largekd.planner.shapes import read_shape

COMMON = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
}
FAMILIES = {
    "llama": {},
    "qwen3": {"head_dim": 16},
    "phi3": {"pad_token_id": 0},
    "gpt_neox": {},
    "qwen3_moe": {
        "head_dim": 8,
        "moe_intermediate_size": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "mlp_only_layers": [1],
    },
}
PATTERNS = {"phi3": {"pattern": "proj$"}, "gpt_neox": {"pattern": r"attention\.dense$|mlp\."}}


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("lora", [{"rank": 3}, {"rank": 2, "dora": True, "pattern": "."}])
def test_the_count_is_that_of_the_model_itself(model_type, lora):
    pytest.importorskip("peft")
    from peft import inject_adapter_in_model
    from transformers import AutoConfig, AutoModelForCausalLM

    from largekd.models.build import layers_path
    from largekd.models.lora import _peft_config, lora_targets

    tree = COMMON | FAMILIES[model_type]
    config = LoraConfig.model_validate(lora | PATTERNS.get(model_type, {}))
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **tree), dtype=torch.float32)
    for index, names in lora_targets(model, config=config).items():
        inject_adapter_in_model(_peft_config(config, targets=names), model.get_submodule(layers_path(model))[index])
    expected = sum(p.numel() for name, p in model.named_parameters() if ".lora_" in name)
    assert expected > 0
    assert adapter_count(read_shape({"model_type": model_type, **tree}), config=config) == expected


def test_a_pattern_that_finds_nothing_is_refused_with_the_familys_names():
    shape = read_shape({"model_type": "gpt_neox", **COMMON})
    with pytest.raises(ConfigError, match=r"pattern = 'q_proj'.* gpt_neox\.layers\.0\.attention\.query_key_value"):
        adapter_count(shape, config=LoraConfig(pattern="q_proj"))
    assert adapter_count(shape, config=None) is None


def test_only_adapters_have_optimizer_state_and_the_base_teaches_for_nothing(tmp_path):
    tree = COMMON | {"model_type": "llama", "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4}
    (tmp_path / "config.json").write_text(json.dumps(tree))
    common = {
        "run": {"dir": "runs/x"},
        "data": {"train": "t.jsonl"},
        "train": {"max_steps": 1, "global_batch_size": 4, "micro_batch_size": 1, "sequence_length": 32},
    }
    student = {"model": str(tmp_path), "deepspeed": "ds_configs/zero3.json"}
    online = {"model": str(tmp_path), "deepspeed": "ds_configs/teacher_zero3.json"}
    whole, adapted, alone = (
        plan(parse_config(common | {"teacher": teacher, "student": student | more}), world_size=2)
        for teacher, more in ((online, {}), (online, {"lora": {"rank": 4}}), ({"kind": "base"}, {"lora": {"rank": 4}}))
    )

    def size(made, name, role="student"):
        return sum(term.bytes for term in made.terms if term.name == name and term.role == role)

    adapters = adapter_count(whole.student, config=LoraConfig(rank=4))
    for name, per_element in (("Adam moments", 8), ("float32 master weights", 4), ("gradients, own shard", 4)):
        assert size(whole, name) == whole.student.parameter_count // 2 * per_element
        assert size(adapted, name) == adapters // 2 * per_element, name
    assert size(adapted, "adapters, own shard") == adapters // 2 * 2
    assert size(adapted, "vocabulary head's gradient") == 0 < size(whole, "vocabulary head's gradient")
    assert size(alone, "weights, own shard", role="teacher") == 0 < size(adapted, "weights, own shard", role="teacher")
    assert size(alone, "hidden states", role="teacher") == 32 * 256 * 2
