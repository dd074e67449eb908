"""Statistics of a teacher's activations: against a plain loop in float64, whatever the ranks and micro-batches."""

from pathlib import Path
from typing import Any

import pytest
import torch
from alignment_reference import aligned_rows
from calibration_jobs import filler, measured
from pool import RankPool
from tiny import save_tiny_llama
from torch import Tensor
from transformers import AutoModelForCausalLM

from largekd.initialisation.forwards import real_positions
from largekd.initialisation.influence import influential_layers

ROWS = 7


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_llama(tmp_path_factory.mktemp("calibration") / "teacher", seed=3, layers=3))


def reference(folder: str, *, packed: bool) -> dict[str, Any]:
    """Every statistic by a loop over rows and positions of an unsharded model in float64."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager")
    seen: dict[str, Tensor] = {}

    def keep(name: str, *, inputs: bool) -> Any:
        return lambda _m, given, output: seen.__setitem__(name, (given[0] if inputs else output)[0])

    layers = model.model.layers
    for place, layer in enumerate(layers):
        layer.register_forward_hook(keep(f"in.{place}", inputs=True))
        layer.register_forward_hook(keep(f"out.{place}", inputs=False))
        layer.post_attention_layernorm.register_forward_hook(keep(f"middle.{place}", inputs=True))
        layer.input_layernorm.register_forward_hook(keep(f"norm.{place}.a", inputs=False))
        layer.post_attention_layernorm.register_forward_hook(keep(f"norm.{place}.b", inputs=False))
        layer.mlp.down_proj.register_forward_hook(keep(f"neurons.{place}", inputs=True))
        layer.self_attn.o_proj.register_forward_hook(keep(f"heads.{place}", inputs=True))
    model.model.norm.register_forward_hook(keep("norm.last", inputs=False))
    count, depth, config = 0, len(layers), model.config
    units = torch.zeros(config.hidden_size, dtype=torch.float64)
    moment = torch.zeros(config.hidden_size, config.hidden_size, dtype=torch.float64)
    neurons = torch.zeros(depth, config.intermediate_size, dtype=torch.float64)
    heads = torch.zeros(depth, config.num_attention_heads, dtype=torch.float64)
    influence = torch.zeros(depth, dtype=torch.float64)
    for row in aligned_rows(count=ROWS, packed=packed):
        with torch.no_grad():
            model(**row.model_inputs, use_cache=False)
        for place in range(row.segments[0][-1].offset + row.segments[0][-1].length):
            count += 1
            for name in [name for name in seen if name.startswith("norm.")]:
                units += seen[name][place].abs() / (2 * depth + 1)
            streams = [f"{kind}.{layer}" for kind in ("in", "middle") for layer in range(depth)]
            for name in (*streams, f"out.{depth - 1}"):
                state = seen[name][place] / seen[name][place].square().mean().sqrt()
                moment += torch.outer(state, state) / (2 * depth + 1)
            for layer in range(depth):
                neurons[layer] += seen[f"neurons.{layer}"][place].abs()
                for head, part in enumerate(seen[f"heads.{layer}"][place].chunk(config.num_attention_heads)):
                    heads[layer, head] += part.norm()
                both = seen[f"in.{layer}"][place], seen[f"out.{layer}"][place]
                influence[layer] += 1 - torch.nn.functional.cosine_similarity(*both, dim=0)
    return {
        "positions": count,
        "units_D": units / count,
        "energy_D": moment.diagonal() / count,
        "moment_DD": moment / count,
        "neurons_NF": tuple(neurons / count),
        "heads_NH": tuple(heads / count),
        "influence_N": influence / count,
    }


def assert_same(found: dict[str, Any], expected: dict[str, Any], *, rtol: float) -> None:
    for name, value in expected.items():
        if isinstance(value, tuple):
            torch.testing.assert_close(torch.stack(found[name]), torch.stack(value), rtol=rtol, atol=rtol, msg=name)
        else:
            torch.testing.assert_close(
                torch.as_tensor(found[name]).double(), torch.as_tensor(value).double(), rtol=rtol, atol=rtol
            )


@pytest.mark.parametrize("packed", [True, False])
def test_each_statistic_is_what_a_plain_loop_gives(one_rank: RankPool, teacher: str, packed: bool) -> None:
    [found] = one_rank.run(measured, folder=teacher, packed=packed, rows=ROWS, per_batch=2)
    assert_same(found, reference(teacher, packed=packed), rtol=2e-5)
    assert found["hooks"] == 0


@pytest.mark.parametrize("packed", [True, False])
def test_neither_ranks_nor_batches_nor_the_engine_matter(
    one_rank: RankPool, two_ranks: RankPool, teacher: str, packed: bool
) -> None:
    [base] = one_rank.run(measured, folder=teacher, packed=packed, rows=ROWS, per_batch=1)
    [batched] = one_rank.run(measured, folder=teacher, packed=packed, rows=ROWS, per_batch=4)
    both = two_ranks.run(measured, folder=teacher, packed=packed, rows=ROWS, per_batch=2, engine=True)
    expected = {name: value for name, value in base.items() if name != "hooks"}
    for found in (batched, *both):
        assert_same(found, expected, rtol=1e-6)
        assert found["hooks"] == 0


def test_the_second_moment_is_made_only_when_asked_for(one_rank: RankPool, teacher: str) -> None:
    [found] = one_rank.run(measured, folder=teacher, rows=2, moment=False)
    assert found["moment_DD"] is None
    assert float(found["energy_D"].sum()) == pytest.approx(32, rel=1e-5)


def test_fill_and_filler_rows_are_no_positions() -> None:
    row = aligned_rows(count=3, packed=True)[2]
    used = row.segments[0][-1].offset + row.segments[0][-1].length
    assert used < row.input_ids_BS.shape[1]
    assert real_positions(row).tolist() == [[place < used for place in range(row.input_ids_BS.shape[1])]]
    assert not real_positions(filler(row)).any()


def test_the_least_influential_layers_go_and_the_first_one_stays() -> None:
    influence = torch.tensor([0.0, 0.5, 0.1, 0.3, 0.1, 0.6])
    assert influential_layers(influence, keep=4) == (0, 1, 3, 5)
    assert influential_layers(influence, keep=5) == (0, 1, 2, 3, 5)
    assert influential_layers(influence, keep=1) == (0,)
    assert influential_layers(influence, keep=6) == (0, 1, 2, 3, 4, 5)


def test_a_teacher_without_positions_is_refused(one_rank: RankPool, teacher: str, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"student\.initialise\.calibration_rows"):
        one_rank.run(measured, folder=teacher, rows=0)
