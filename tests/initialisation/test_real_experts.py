"""A real dense model as a mixture of experts, where it has been fetched."""

import json
import os
from pathlib import Path

import pytest
import torch
from expert_jobs import initialised_logits
from tiny_run import ROOT
from transformers import AutoModelForCausalLM, AutoTokenizer

from largekd.config.design import DesignConfig
from largekd.planner.design import design_student

SMOLLM2 = Path(os.environ.get("LARGEKD_ASSETS", ROOT / "assets")) / "smollm2-135m-instruct"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (SMOLLM2 / "config.json").is_file(),
        reason="SmolLM2 is not here: python tools/fetch_assets.py smollm2-135m-instruct",
    ),
]


def test_four_experts_of_which_two_act_are_the_dense_model(one_rank, tmp_path):
    teacher = json.loads((SMOLLM2 / "config.json").read_text())
    shape = design_student(teacher, design=DesignConfig(experts=4, active_experts=2), model="teacher.model").config
    (tmp_path / "config.json").write_text(json.dumps(shape))
    text = "Question: A train covers 120 km in one and a half hours. How fast is it? Answer: 120 / 1.5 = 80 km/h."
    ids = AutoTokenizer.from_pretrained(SMOLLM2)(text, return_tensors="pt")["input_ids"]
    (found,) = one_rank.run(initialised_logits, teacher=str(SMOLLM2), student=str(tmp_path), ids=ids)
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(SMOLLM2, dtype=torch.float32).eval()(ids).logits
    assert expected.std() > 1
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
