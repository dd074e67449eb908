"""Taps show what the model computes, and change neither its outputs nor its gradients."""

import math

import pytest
import torch
from initialisation.families import SMALL
from tap_jobs import REQUEST, TapLoss, batch_of, frozen_taps, sharded_gradients
from tiny import save_tiny_llama
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_utils import AttentionInterface

from largekd.contracts import Batch, TapRequest
from largekd.errors import ConfigError
from largekd.models.decoder import Decoder, enable_checkpointing
from largekd.models.taps import Capture, attention_shape, check_layers, depth, hidden_width

LENGTH = 14
MIXED = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "sliding_window": 5}
SLIDING = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
FAMILIES = {
    "cohere2": MIXED,
    "gemma2": {**MIXED, "query_pre_attn_scalar": 11, "attn_logit_softcapping": 2.0},
    "gemma3_text": {**MIXED, "query_pre_attn_scalar": 11},
    "granite": {"attention_multiplier": 0.3},
    "llama": {},
    "mistral": {"sliding_window": 5},
    "mixtral": {"num_local_experts": 4, "sliding_window": 5},
    "olmo2": {},
    "olmoe": EXPERTS,
    "phi3": {"sliding_window": 5},
    "phimoe": {"num_local_experts": 4, "sliding_window": 5},
    "qwen2": SLIDING,
    "qwen2_moe": {**EXPERTS, **SLIDING, "shared_expert_intermediate_size": 16},
    "qwen3": SLIDING,
    "qwen3_moe": {**EXPERTS, **SLIDING},
}
# The window of each layer, written out; the others see all positions before them.
WINDOWS = {
    **dict.fromkeys(("cohere2", "gemma2", "gemma3_text"), (5, None, 5)),
    **dict.fromkeys(("mistral", "mixtral", "phi3", "phimoe", "qwen3_moe"), (5, 5, 5)),
    "qwen2_moe": (5, None, None),
    **dict.fromkeys(("qwen2", "qwen3"), (None, 5, 5)),
}
ALL = TapRequest(hidden=(0, 1, 2), attention=(0, 1, 2))


def tiny(family, *, attention=None, dtype=torch.float32, **changes):
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**SMALL, **FAMILIES.get(family, {}), **changes})
    attention = attention or ("eager" if family == "gemma2" else "sdpa")
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=dtype).eval()


def make_batch(*, packed):
    torch.manual_seed(1)
    ids = torch.randint(3, 67, (3, LENGTH))
    positions = [[*range(6), *range(8)], [*range(1), *range(10), *range(3)], [*range(LENGTH)]]
    lengths = torch.tensor([LENGTH, 9, 1])
    return Batch(
        input_ids_BS=ids,
        labels_BS=ids,
        token_weight_BS=torch.ones(3, LENGTH),
        counted_T=torch.arange(3 * LENGTH),
        position_ids_BS=torch.tensor(positions) if packed else None,
        attention_mask_BS=None if packed else (torch.arange(LENGTH) < lengths[:, None]).long(),
    )


def visible_of(batch, *, window):
    """(B, S, S): whether the query (row) sees the key (column), from the batch alone."""
    place = torch.arange(LENGTH)
    distance = place[:, None] - place
    visible = (distance >= 0) & (distance < (window or LENGTH))
    if batch.position_ids_BS is not None:
        segment = (batch.position_ids_BS == 0).cumsum(-1)
        return visible & (segment[:, :, None] == segment[:, None, :])
    return visible & batch.attention_mask_BS.bool()[:, None, :]


def maps_of(inputs, *, visible):
    """softmax(softcap(scale · query · keyᵀ) + mask), (B, H, S, S)."""
    groups = inputs.query_BHSd.shape[1] // inputs.key_BGSd.shape[1]
    scores = inputs.scale * inputs.query_BHSd @ inputs.key_BGSd.repeat_interleave(groups, 1).transpose(-1, -2)
    if inputs.softcap is not None:
        scores = inputs.softcap * torch.tanh(scores / inputs.softcap)
    return scores.masked_fill(~visible[:, None], -math.inf).softmax(-1)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_outputs_and_gradients_are_bit_identical_with_taps(family, packed):
    decoder, batch = Decoder(model=tiny(family)), make_batch(packed=packed)
    results = []
    for taps in (TapRequest(), ALL, TapRequest(attention=(1,))):
        decoder.zero_grad()
        last = decoder(batch=batch, taps=taps)["last"]
        last.square().sum().backward()
        results.append([last, *(p.grad.clone() for p in decoder.parameters() if p.grad is not None)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    with torch.no_grad():
        plain = decoder.model.get_decoder()(**batch.model_inputs, use_cache=False).last_hidden_state
    assert torch.equal(plain, results[0][0])


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_captured_queries_and_keys_give_the_eager_maps(family, packed):
    decoder, batch = Decoder(model=tiny(family)), make_batch(packed=packed)
    eager = tiny(family, attention="eager")
    eager.load_state_dict(decoder.model.state_dict())
    with torch.no_grad():
        outputs = decoder(batch=batch, taps=ALL)
        reference = eager(**batch.model_inputs, use_cache=False, output_attentions=True, output_hidden_states=True)
    taps = decoder.taps_of(outputs)
    used = torch.ones(3, LENGTH, dtype=torch.bool) if packed else batch.attention_mask_BS.bool()
    for layer, window in enumerate(WINDOWS.get(family, (None,) * 3)):
        inputs = taps.attention[layer]
        assert inputs.window == window
        assert not inputs.query_BHSd.requires_grad
        maps = maps_of(inputs, visible=visible_of(batch, window=window)).transpose(1, 2)[used]
        expected = reference.attentions[layer].transpose(1, 2)[used]
        assert float(expected.amax(-1).std()) > 1e-2
        torch.testing.assert_close(maps, expected, rtol=0, atol=1e-5)
    # hidden_states[i] enters layer i; the last of them has passed the final norm.
    for layer in (0, 1):
        torch.testing.assert_close(
            taps.hidden[layer][used], reference.hidden_states[layer + 1][used], rtol=1e-4, atol=1e-4
        )
    normed = decoder.model.get_decoder().norm(taps.hidden[2])
    assert torch.equal(normed, outputs["last"])


def test_values_are_the_projected_values():
    decoder, batch = Decoder(model=tiny("llama")), make_batch(packed=True)
    seen = []
    projection = decoder.model.model.layers[1].self_attn.v_proj
    handle = projection.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    value = decoder(batch=batch, taps=ALL)["attention.1.value"]
    handle.remove()
    assert torch.equal(value, seen[0].unflatten(-1, (2, 8)).transpose(1, 2))


def test_only_what_is_asked_for_is_returned():
    decoder, batch = Decoder(model=tiny("qwen3")), make_batch(packed=True)
    assert set(decoder(batch=batch)) == {"last"}
    outputs = decoder(batch=batch, taps=TapRequest(hidden=(2,), attention=(0,)))
    assert set(outputs) == {"last", "hidden.2", "attention.0.query", "attention.0.key", "attention.0.value"}
    taps = decoder.taps_of(outputs)
    assert set(taps.hidden) == {2} and set(taps.attention) == {0}
    assert decoder.taps_of(decoder(batch=batch)).attention == {}


@pytest.mark.parametrize("family", ["qwen3", "gemma2", "mixtral"])
def test_recomputation_records_nothing_and_changes_no_gradient(family, monkeypatch):
    recorded, runs = [], []
    for name in ("take_output", "take_attention"):
        original = getattr(Capture, name)

        def counting(self, *arguments, _original=original, **options):
            recorded.append(options["layer"])
            return _original(self, *arguments, **options)

        monkeypatch.setattr(Capture, name, counting)
    gradients = []
    for checkpointing in (False, True):
        decoder = Decoder(model=tiny(family))
        if checkpointing:
            enable_checkpointing(decoder.model)
        module = TapLoss(decoder=decoder).train()
        decoder.model.get_decoder().layers[1].self_attn.register_forward_hook(lambda *_: runs.append(1))
        recorded.clear()
        runs.clear()
        # The first forward's blocks run again after the second forward was armed and left.
        loss = sum(module(batch=make_batch(packed=packed))["loss"] for packed in (True, False))
        loss.backward()
        assert sorted(recorded) == sorted(2 * (*REQUEST.hidden, *REQUEST.attention))
        assert len(runs) == (4 if checkpointing else 2)
        gradients.append({name: p.grad for name, p in module.named_parameters() if p.grad is not None})
    for name, gradient in gradients[0].items():
        scale = float(gradient.abs().max())
        assert scale > 0 and float((gradients[1][name] - gradient).abs().max()) <= 1e-6 * scale, name


def test_a_tap_s_gradient_is_the_finite_difference():
    decoder, batch = Decoder(model=tiny("qwen3", dtype=torch.float64)), make_batch(packed=True)
    enable_checkpointing(decoder.model)
    module = TapLoss(decoder=decoder, last=0.0).train()
    weight = decoder.model.model.layers[1].self_attn.q_proj.weight
    module(batch=batch)["loss"].backward()
    direction = weight.grad / weight.grad.norm()
    losses = []
    with torch.no_grad():
        # Norms, rotary angles and softmax are float32 in any model.
        for step in (1e-3, -2e-3):
            weight += step * direction
            losses.append(float(module(batch=batch)["loss"]))
    assert float((weight.grad * direction).sum()) == pytest.approx((losses[0] - losses[1]) / 2e-3, rel=5e-3)


def test_a_failed_forward_leaves_the_model_as_it_was():
    decoder, batch = Decoder(model=tiny("llama")), make_batch(packed=True)
    layers = decoder.model.model.layers
    before = decoder(batch=batch)["last"]

    def fail(*_):
        raise RuntimeError("no memory")

    handle = layers[0].register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="no memory"):
        decoder(batch=batch, taps=ALL)
    handle.remove()
    assert all(layer.self_attn.config is decoder.model.config for layer in layers)
    assert not any(layer._forward_hooks for layer in layers)
    assert torch.equal(decoder(batch=batch)["last"], before)


def test_flash_attention_sees_its_own_name_and_its_flat_rows_come_back_as_rows(monkeypatch):
    batch, flash_rows = make_batch(packed=True), []

    def flash(module, query, key, value, attention_mask, *, scaling, position_ids, **options):
        # What the kernel does: one row, segments found in the positions. It asks for its version by this name.
        assert module.config._attn_implementation == "flash_attention_2"
        assert attention_mask is None
        flash_rows.append(query.shape)
        segment = (position_ids == 0).cumsum(-1)[0]
        place = torch.arange(segment.numel())
        mask = (segment[:, None] == segment) & (place[:, None] >= place)
        output = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, scale=scaling, enable_gqa=True
        )
        return output.transpose(1, 2), None

    monkeypatch.setitem(AttentionInterface._global_mapping, "flash_attention_2", flash)
    plain, flat = (Decoder(model=tiny("llama")) for _ in range(2))
    flat.load_state_dict(plain.state_dict())
    flat.model.config._attn_implementation = "flash_attention_2"
    expected, found = (decoder(batch=batch, taps=ALL) for decoder in (plain, flat))
    assert flash_rows == [(1, 4, 3 * LENGTH, 8)] * 3
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5)
    assert torch.equal(flat(batch=batch)["last"], found["last"])


@pytest.mark.slow
@pytest.mark.parametrize("packed", [True, False])
def test_flex_attention_is_tapped_in_its_compiled_form(packed):
    batch = make_batch(packed=packed)
    plain, flex = (Decoder(model=tiny("qwen2", attention=name)) for name in ("sdpa", "flex_attention"))
    flex.load_state_dict(plain.state_dict())
    with torch.no_grad():
        expected, found, untapped = plain(batch=batch, taps=ALL), flex(batch=batch, taps=ALL), flex(batch=batch)
    assert torch.equal(found["last"], untapped["last"])
    used = torch.ones(3, LENGTH, dtype=torch.bool) if packed else batch.attention_mask_BS.bool()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        rows = [(t.transpose(1, 2) if name.startswith("attention") else t)[used] for t in (found[name], tensor)]
        torch.testing.assert_close(*rows, rtol=1e-4, atol=1e-4)
    assert flex.taps_of(found).attention[1].window == 5


def test_shapes_that_a_build_needs():
    model = tiny("qwen3", num_attention_heads=6, num_key_value_heads=3, head_dim=10)
    inputs = Decoder(model=model)
    shape = attention_shape(model, layer=1)
    query, key = (
        inputs(batch=make_batch(packed=True), taps=ALL)[f"attention.1.{name}"].shape for name in ("query", "key")
    )
    assert (shape.heads, shape.head_width, shape.key_heads) == (query[1], query[3], key[1]) == (6, 10, 3)
    assert (depth(model), hidden_width(model)) == (3, 32)


@pytest.mark.parametrize("request_", [TapRequest(hidden=(0, 3)), TapRequest(attention=(-1,))])
def test_a_layer_that_does_not_exist_is_refused(request_):
    with pytest.raises(ConfigError, match=r"objective\.features\[0\]\.layers: layer (3|-1) does not .* 0 to 2"):
        check_layers(request_, model=tiny("llama"), key="objective.features[0].layers")


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_layers_that_exist_are_accepted(family):
    check_layers(ALL, model=tiny(family), key="objective")


@pytest.mark.parametrize(
    ("family", "changes", "reason"),
    [
        ("gpt_oss", {"num_local_experts": 4}, "sinks"),
        ("deepseek_v3", {"kv_lora_rank": 8, "q_lora_rank": 8, "first_k_dense_replace": 3}, "latent"),
        ("llama", {"layer_types": ["full_attention", "chunked_attention", "full_attention"]}, "chunked_attention"),
        ("bloom", {}, "interface"),
    ],
)
def test_attention_that_queries_and_keys_do_not_determine_is_refused(family, changes, reason):
    model = tiny(family, attention="eager", **changes)
    with pytest.raises(ConfigError, match=rf"objective\.attention\[0\].*layer 1.*{family}.*{reason}"):
        check_layers(TapRequest(attention=(1,)), model=model, key="objective.attention[0]")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(save_tiny_llama(tmp_path_factory.mktemp("taps") / "model", seed=3, layers=3))


def whole(folder):
    return Decoder(model=AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa"))


@pytest.mark.parametrize(
    ("checkpointing", "packed", "last"), [(False, True, 1.0), (True, True, 0.0), (True, False, 1.0)]
)
def test_gradients_of_taps_on_two_ranks_are_those_of_one_process(folder, two_ranks, checkpointing, packed, last):
    module = TapLoss(decoder=whole(folder), last=last).train()
    for rank in (0, 1):
        (module(batch=batch_of(rank, packed=packed))["loss"] / 2).backward()
    expected = {name.removeprefix("decoder.model."): p.grad for name, p in module.named_parameters()}
    for found in two_ranks.run(sharded_gradients, folder=folder, checkpointing=checkpointing, packed=packed, last=last):
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            error = float((found[name] - gradient).abs().max())
            assert error <= 1e-6 * max(1.0, float(gradient.abs().max())), (name, error)


def test_a_sharded_frozen_model_captures_the_same(folder, two_ranks):
    decoder = whole(folder)
    for rank, found in enumerate(two_ranks.run(frozen_taps, folder=folder)):
        with torch.no_grad():
            expected = decoder(batch=batch_of(rank, packed=True), taps=REQUEST)
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert not found[name].requires_grad
            torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-6)
