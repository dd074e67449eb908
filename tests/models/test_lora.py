"""Adapters on a sharded student: how they start, what learns, what is exported."""

import lora_jobs as jobs
import pytest
import torch
from placements import needs_libaio, offload
from tiny import join_rows, make_rows, save_tiny_llama

pytest.importorskip("peft")

KINDS = [{}, {"dora": True}]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return str(save_tiny_llama(tmp_path_factory.mktemp("lora") / "base", seed=0, layers=3))


def peft_model(base, adapter):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()


@pytest.mark.parametrize("kind", KINDS)
def test_the_student_starts_as_its_base_and_only_adapters_learn(base, one_rank, two_ranks, kind):
    from transformers import AutoModelForCausalLM

    (alone,), (first, second) = (ranks.run(jobs.start_of, folder=base, **kind) for ranks in (one_rank, two_ranks))
    batch = join_rows(make_rows(count=2, packed=True))
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(base).model(**batch.model_inputs, use_cache=False)
    for found in (alone, first, second):
        torch.testing.assert_close(found["hidden"], expected.last_hidden_state, rtol=1e-5, atol=1e-5)
        assert found["sharded"]
        assert len(found["learning"]) == 3 * 4 * (3 if kind else 2)
        assert all(".lora_" in name for name in found["learning"])
        assert found["weights"].keys() == alone["weights"].keys()
        for name, weight in alone["weights"].items():
            assert torch.equal(found["weights"][name], weight), name
    assert alone["weights"]["model.layers.0.mlp.up_proj.lora_A.default.weight"].abs().max() > 0


def test_adapters_have_the_dtype_of_their_base(base, one_rank):
    (found,) = one_rank.run(jobs.start_of, folder=base, precision="bf16", dora=True)
    assert found["dtypes"] == {torch.bfloat16}


@pytest.mark.parametrize("kind", KINDS)
def test_the_export_is_what_peft_merges_and_the_adapter_is_one_that_peft_loads(base, two_ranks, tmp_path, kind):
    from transformers import AutoModelForCausalLM

    found, _ = two_ranks.run(jobs.outputs, folder=base, into=str(tmp_path / "export"), **kind)
    batch = join_rows(make_rows(count=2, packed=False))
    plain = AutoModelForCausalLM.from_pretrained(base)
    assert sorted(found["names"]) == sorted(name for name, _ in plain.named_parameters())
    with torch.no_grad():
        base_hidden = plain.model(**batch.model_inputs).last_hidden_state
        exported = AutoModelForCausalLM.from_pretrained(tmp_path / "export")
        logits = exported(**batch.model_inputs).logits
        hidden = exported.model(**batch.model_inputs).last_hidden_state
        adapter = peft_model(base, tmp_path / "export/adapter")
        apart = adapter(**batch.model_inputs).logits
        merged = adapter.merge_and_unload()(**batch.model_inputs).logits
    outputs = found["outputs"]
    torch.testing.assert_close(logits, merged, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits, apart, rtol=1e-4, atol=1e-4)
    for name in ("student", "student again", "copy"):
        torch.testing.assert_close(outputs[name]["last"], hidden, rtol=1e-4, atol=1e-4, msg=name)
    torch.testing.assert_close(outputs["base"]["last"], base_hidden, rtol=1e-5, atol=1e-5)
    for tap in ("hidden.0", "attention.1.query"):
        assert (outputs["student"][tap] - outputs["base"][tap]).abs().max() > 0.05, tap
        assert torch.equal(outputs["student"][tap], outputs["student again"][tap]), tap


def test_base_alone_is_not_for_forwards_that_are_recomputed():
    from transformers import LlamaConfig, LlamaForCausalLM

    from largekd.models.lora import base_alone

    model = LlamaForCausalLM(LlamaConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=2))
    with pytest.raises(AssertionError, match="recomputation"), base_alone(model):
        pass


@pytest.mark.parametrize("kind", KINDS)
def test_training_leaves_the_base_alone_and_keeps_state_for_adapters_only(base, two_ranks, kind):
    found, _ = two_ranks.run(jobs.training, folder=base, steps=3, **kind)
    learns = {name for name in found["before"] if ".lora_" in name}
    for name, weight in found["before"].items():
        assert torch.equal(found["after"][name], weight) == (name not in learns), name
    adapters = sum(found["before"][name].numel() for name in learns)
    # Shards are padded to the ranks.
    assert 2 * adapters <= found["state"] <= 2 * (adapters + 2 * len(learns))


@pytest.mark.parametrize("device", ["cpu", pytest.param("nvme", marks=needs_libaio)])
def test_offload_changes_nothing_but_the_place(base, two_ranks, tmp_path, device):
    plain, moved = (
        two_ranks.run(jobs.training, folder=base, steps=2, dora=True, zero=zero)[0]
        for zero in (None, offload(device, folder=tmp_path, optimizer=device == "cpu"))
    )
    torch.testing.assert_close(torch.tensor(moved["losses"]), torch.tensor(plain["losses"]), rtol=1e-5, atol=1e-6)
    for name, weight in plain["after"].items():
        torch.testing.assert_close(moved["after"][name], weight, rtol=1e-4, atol=1e-6, msg=name)


def test_dropout_before_the_adapter_is_part_of_the_student_only(base, one_rank):
    (still,) = one_rank.run(jobs.training, folder=base, steps=2, noise=0.0)
    (dropped,) = one_rank.run(jobs.training, folder=base, steps=2, noise=0.0, dropout=0.5)
    assert still["losses"][0] == dropped["losses"][0], "B is zero, and the teacher has no dropout"
    assert still["losses"][1] != dropped["losses"][1]
