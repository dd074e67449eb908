"""Answers of a sharded model: those of plain transformers, on any number of ranks, and nothing left behind."""

import numpy as np
import pytest
import torch
from rollout_jobs import plain_answers, prompts, write_answers
from tiny import save_tiny_llama
from transformers import AutoModelForCausalLM

from largekd.errors import ConfigError
from largekd.generation.sampling import DrawRule
from largekd.generation.writer import Question, StopTokens, Writer
from largekd.runtime.ranks import Ranks


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    return save_tiny_llama(tmp_path_factory.mktemp("models") / "student", seed=1)


@pytest.mark.parametrize("gather", ["whole", "streamed"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_greedy_answers_are_those_of_plain_transformers(student, one_rank, two_ranks, gather, checkpointing):
    expected = plain_answers(student=student, count=7)
    options = {"student": str(student), "gather": gather, "count": 7, "temperature": 0.0}
    for pool in (one_rank, two_ranks):
        results = pool.run(write_answers, **options, checkpointing=checkpointing)
        assert [list(ids) for result in results for ids in result["ids"]] == expected
        for result in results:
            assert result["training"] and result["leaked_bytes"] == 0 and result["same_rng"]
            assert result["beats"] >= 2


@pytest.mark.parametrize("gather", ["whole", "streamed"])
def test_draws_depend_on_their_seeds_alone(student, one_rank, two_ranks, gather):
    options = {"student": str(student), "gather": gather, "count": 7, "temperature": 1.0}
    (alone,) = one_rank.run(write_answers, **options)
    pair = two_ranks.run(write_answers, **options, batch_size=2)
    assert [ids for result in pair for ids in result["ids"]] == alone["ids"]
    assert len({tuple(ids) for ids in alone["ids"]}) > 1
    for mine, theirs in zip((row for result in pair for row in result["logq"]), alone["logq"], strict=True):
        assert mine == pytest.approx(theirs, abs=1e-5)


def test_log_probabilities_are_those_of_a_forward_pass(student, one_rank):
    (found,) = one_rank.run(write_answers, student=str(student), gather="whole", count=4, temperature=0.7)
    model = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32)
    for prompt, ids, logq in zip(prompts(count=4), found["ids"], found["logq"], strict=True):
        whole = torch.tensor([[*prompt, *ids]])
        with torch.no_grad():
            expected = model(whole).logits[0].log_softmax(-1)[len(prompt) - 1 : -1]
        assert logq == pytest.approx(expected.gather(-1, torch.tensor(ids)[:, None]).squeeze(-1).tolist(), abs=1e-5)


@pytest.mark.parametrize("gather", ["whole", "streamed"])
def test_uneven_ends_and_a_rank_without_work(student, one_rank, two_ranks, gather):
    free = plain_answers(student=student, count=5)
    ends = (free[0][0], free[1][2])
    expected = plain_answers(student=student, count=5, ends=ends)
    expected = [answer[: 1 + next((i for i, t in enumerate(answer) if t in ends), 6)] for answer in expected]
    assert len(expected[0]) == 1 and len({len(answer) for answer in expected}) > 1
    options = {"student": str(student), "gather": gather, "temperature": 0.0, "ends": ends}
    results = two_ranks.run(write_answers, **options, count=5)
    assert [list(ids) for result in results for ids in result["ids"]] == expected
    assert [ended for result in results for ended in result["ended"]] == [a[-1] in ends for a in expected]
    # One answer: the second rank has none.
    results = two_ranks.run(write_answers, **options, count=1)
    assert [result["ids"] for result in results] == [[tuple(expected[0])], []]


def _writer(model, *, gather):
    return Writer(
        model,
        rule=DrawRule(ids=101, temperature=0.0),
        stops=StopTokens(ends=(2,), fill=2),
        max_new_tokens=7,
        batch_size=3,
        gather=gather,
        device=torch.device("cpu"),
        ranks=Ranks(),
    )


def test_a_model_that_cannot_be_copied_streams_or_is_refused_when_the_run_is_built(student):
    model = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32)
    model.model.register_parameter("extra", torch.nn.Parameter(torch.zeros(1)))
    questions = [Question(np.array(ids, np.int32), seed=(0,)) for ids in prompts(count=3)]
    answers = _writer(model, gather="auto").write(questions, calls=1, beat=lambda: None)
    assert len(answers) == 3 and all(answer.ids for answer in answers)
    with pytest.raises(ConfigError, match=r"rollouts\.gather=streamed"):
        _writer(model, gather="whole")
