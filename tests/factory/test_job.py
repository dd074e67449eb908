"""The job: every ask answered once, whatever happens in between."""

import json
import signal
import time
from pathlib import Path

import pytest
from factory_jobs import (
    ScriptedBackend,
    answers_in,
    current_answers,
    job_settings,
    kill,
    repeated,
    run_job,
    start_scripted,
)
from tiny_run import changed

from largekd.curation.answer_shards import read_answers, shard_paths
from largekd.errors import ConfigError, DataError, GenerationError
from largekd.runtime.faults import VARIABLE
from largekd.runtime.files import TEMPORARY_PREFIX


def test_every_row_is_asked_by_every_template_for_every_sample(tmp_path):
    tree = job_settings(tmp_path)
    assert run_job(tree, backend=ScriptedBackend())
    found = list(read_answers(tmp_path / "job/raw"))
    wanted = {(f"r{n}", template, i) for n in range(5) for template in ("direct", "step_by_step") for i in (0, 1)}
    assert {(a.ask.item.id, a.ask.template, a.ask.sample) for a in found} == wanted
    assert len(found) == len(wanted) and all(a.ask.key == a.written.key for a in found)
    assert all(len(path.read_text().splitlines()) <= 4 for path in shard_paths(tmp_path / "job/raw"))


def test_a_whole_job_asks_nothing_again_and_more_samples_and_rows_only_what_is_new(tmp_path):
    tree = job_settings(tmp_path)
    assert run_job(tree, backend=ScriptedBackend())
    before = answers_in(tmp_path / "job/raw")
    again = ScriptedBackend()
    assert run_job(tree, backend=again) and again.asked == []
    more = ScriptedBackend()
    assert run_job(job_settings(tmp_path, rows=6, sampling__samples=3), backend=more)
    after = answers_in(tmp_path / "job/raw")
    assert set(before) < set(after) and len(after) == 6 * 2 * 3 and len(more.asked) == len(after) - len(before)


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("sampling__temperature", 0.1, "sampling.temperature: 0.7 -> 0.1"),
        ("sampling__seed", 4, "sampling.seed: 0 -> 4"),
        ("prompts__system", "Be brief.", "prompts.system: None -> 'Be brief.'"),
        ("source__question", "id", "source.question: 'question' -> 'id'"),
    ],
)
def test_another_job_in_the_folder_is_refused_and_named(tmp_path, key, value, named):
    tree = job_settings(tmp_path)
    assert run_job(tree, backend=ScriptedBackend())
    other = ScriptedBackend()
    with pytest.raises(ConfigError, match="holds answers of another job") as raised:
        run_job(changed(tree, **{key: value}), backend=other)
    assert named in str(raised.value) and other.asked == []


def test_the_longest_prompt_may_change_and_what_failed_for_it_is_asked_again(tmp_path):
    tree = job_settings(tmp_path, sampling__max_prompt_tokens=7)
    assert run_job(tree, backend=ScriptedBackend(fail_on="What is 3"))
    more = changed(tree, sampling__max_prompt_tokens=70, output__retry_failed=True)
    backend = ScriptedBackend()
    assert run_job(more, backend=backend) and len(backend.asked) == 4


def test_two_templates_of_one_name_are_refused(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "mine.jinja").write_text("{% block user %}{{ question }}{% endblock %}")
    names = [str(tmp_path / folder / "mine.jinja") for folder in ("a", "b")]
    for templates in (names, ["direct", "direct"]):
        with pytest.raises(ConfigError, match=r"prompts\.templates\.1 = .* is called '(mine|direct)' too"):
            run_job(job_settings(tmp_path, prompts__templates=templates), backend=ScriptedBackend())


def test_a_full_disk_is_told_and_what_is_there_stays(tmp_path, monkeypatch):
    tree = job_settings(tmp_path)
    monkeypatch.setenv(VARIABLE, "generate:before_shard:rank0:step2-99:enospc")
    with pytest.raises(GenerationError, match=r"output\.dir: .*No space left on device"):
        run_job(tree, backend=ScriptedBackend())
    monkeypatch.delenv(VARIABLE)
    assert len(answers_in(tmp_path / "job/raw")) == 8
    rest = ScriptedBackend()
    assert run_job(tree, backend=rest) and len(rest.asked) == 12


@pytest.mark.parametrize(
    ("point", "safe"), [pytest.param("before_shard", 8, marks=pytest.mark.slow), ("after_shard", 12)]
)
def test_killed_beside_a_commit_it_has_the_shard_whole_or_not_at_all(tmp_path, monkeypatch, point, safe):
    tree, raw = job_settings(tmp_path), tmp_path / "job/raw"
    monkeypatch.setenv(VARIABLE, f"generate:{point}:rank0:step2:sigkill")
    (process,) = start_scripted(tree, ranks=1, pause_s=0.0, log=tmp_path / "log")
    assert process.wait(timeout=120) == -signal.SIGKILL, (tmp_path / "log.0").read_text()[-2000:]
    monkeypatch.delenv(VARIABLE)
    # What a kill in the middle of a write leaves.
    (raw / f"{TEMPORARY_PREFIX}shard_000009.jsonl-x").write_text('{"ask": {"it')
    assert len(answers_in(raw)) == safe
    rest = ScriptedBackend()
    assert run_job(tree, backend=rest) and len(rest.asked) == 20 - safe
    assert not repeated(answers_in(raw)) and not list(raw.glob(f"{TEMPORARY_PREFIX}*"))


def test_another_template_text_is_refused(tmp_path):
    template = tmp_path / "mine.jinja"
    template.write_text("{% block user %}{{ question }}{% endblock %}")
    tree = job_settings(tmp_path, prompts__templates=[str(template)])
    assert run_job(tree, backend=ScriptedBackend())
    template.write_text("{% block user %}Please: {{ question }}{% endblock %}")
    with pytest.raises(ConfigError, match="templates"):
        run_job(tree, backend=ScriptedBackend())


def test_a_damaged_shard_is_told_and_never_dropped(tmp_path):
    tree = job_settings(tmp_path)
    assert run_job(tree, backend=ScriptedBackend())
    path = shard_paths(tmp_path / "job/raw")[0]
    path.write_text(path.read_text().replace("What is", "What Is", 1))
    with pytest.raises(DataError, match=path.name):
        run_job(tree, backend=ScriptedBackend())


def test_a_failed_answer_is_a_row_with_the_reason(tmp_path):
    assert run_job(job_settings(tmp_path), backend=ScriptedBackend(fail_on="What is 3"))
    found = [answer.written for answer in read_answers(tmp_path / "job/raw")]
    assert [written.failure for written in found if written.finish == "failed"] == ["asked to fail"] * 4
    assert len(found) == 20


def test_failed_answers_are_asked_for_again_on_request_alone_and_the_newest_counts(tmp_path):
    tree = job_settings(tmp_path, rows=4)
    assert run_job(tree, backend=ScriptedBackend(fail_on="What is 2"))
    unasked = ScriptedBackend()
    assert run_job(tree, backend=unasked) and unasked.asked == []
    again = changed(tree, output__retry_failed=True)
    assert run_job(again, backend=ScriptedBackend(fail_on="What is 2"))
    answered = ScriptedBackend()
    assert run_job(again, backend=answered) and len(answered.asked) == 4
    done = ScriptedBackend()
    assert run_job(again, backend=done) and done.asked == []
    whole = changed(tree, output__dir=str(tmp_path / "whole"))
    assert run_job(whole, backend=ScriptedBackend())
    for found in (list(read_answers(tmp_path / "job/raw")), current_answers(tmp_path / "job")):
        assert sorted((ask.key, written.text) for ask, written in found) == answers_in(tmp_path / "whole/raw")
        assert sorted(ask.attempt for ask, _ in found) == [0] * 12 + [2] * 4


@pytest.mark.parametrize("change", [{"prompts__turns": 2}, {"prompts__revise": True}])
def test_a_conversation_that_goes_on_after_all_replaces_its_failure(tmp_path, change):
    tree = job_settings(tmp_path, rows=4, **change)
    for fail_on in ("What is 2", "Person: What is 2" if "prompts__turns" in change else "Look at"):
        assert run_job(tree, backend=ScriptedBackend(fail_on=fail_on))
        tree = changed(tree, output__retry_failed=True)
    assert run_job(tree, backend=ScriptedBackend())
    whole = changed(tree, output__dir=str(tmp_path / "whole"))
    assert run_job(whole, backend=ScriptedBackend())
    found = current_answers(tmp_path / "job")
    assert sorted((ask.key, written.text) for ask, written in found) == answers_in(tmp_path / "whole/raw")


def test_a_whole_job_does_not_wake_its_writer(tmp_path):
    tree = job_settings(tmp_path, prompts__revise=True)
    assert run_job(tree, backend=ScriptedBackend())

    class Asleep(ScriptedBackend):
        def write(self, asks, *, stopping):
            raise AssertionError("it would load its weights")

    assert run_job(tree, backend=Asleep())


class _Broken(ScriptedBackend):
    """Raises after four answers."""

    def write(self, asks, *, stopping):
        for count, written in enumerate(super().write(asks, stopping=stopping)):
            yield written
            if count == 3:
                raise ConfigError("the key was refused")


def test_what_was_written_before_an_error_is_committed(tmp_path):
    tree = job_settings(tmp_path, output__shard_rows=100)
    with pytest.raises(ConfigError, match="the key was refused"):
        run_job(tree, backend=_Broken())
    assert len(answers_in(tmp_path / "job/raw")) == 4


def broken_on_rank(*, tree: dict, rank: int) -> str:
    """For a rank pool: one rank's writer raises, the others' do not."""
    import torch.distributed as dist

    backend = _Broken() if dist.get_rank() == rank else ScriptedBackend(pause_s=0.02)
    try:
        run_job(tree, backend=backend)
    except ConfigError as error:
        return str(error)
    return "no error"


def whole_on_ranks(*, tree: dict) -> bool:
    """For a rank pool: the job with a writer on each rank."""
    return run_job(tree, backend=ScriptedBackend(pause_s=0.01))


def test_an_error_of_one_rank_ends_the_others_and_saves_their_work(tmp_path, two_ranks):
    told = two_ranks.run(broken_on_rank, tree=job_settings(tmp_path, rows=200), rank=1)
    assert all("the key was refused" in text for text in told)
    answers = answers_in(tmp_path / "job/raw")
    assert 4 <= len(answers) < 800 and not repeated(answers)


def test_two_ranks_write_what_one_writes(tmp_path, two_ranks):
    tree = job_settings(tmp_path / "one", rows=9)
    assert run_job(tree, backend=ScriptedBackend())
    other = changed(tree, output__dir=str(tmp_path / "two/job"))
    assert two_ranks.run(whole_on_ranks, tree=other) == [True, True]
    assert answers_in(tmp_path / "two/job/raw") == answers_in(tmp_path / "one/job/raw")
    # Both ranks worked.
    numbers = {int(path.name[6:12]) % 2 for path in shard_paths(tmp_path / "two/job/raw")}
    assert numbers == {0, 1}


def test_another_number_of_ranks_asks_again_for_what_failed_and_no_more(tmp_path, two_ranks):
    tree = job_settings(tmp_path / "one", rows=9)
    assert run_job(tree, backend=ScriptedBackend(fail_on="What is 2"))
    again = changed(tree, output__retry_failed=True)
    assert two_ranks.run(whole_on_ranks, tree=again) == [True, True]
    assert len(answers_in(tmp_path / "one/job/raw")) == 9 * 4 + 4
    whole = changed(tree, output__dir=str(tmp_path / "whole"))
    assert run_job(whole, backend=ScriptedBackend())
    found = current_answers(tmp_path / "one/job")
    assert sorted((ask.key, written.text) for ask, written in found) == answers_in(tmp_path / "whole/raw")


def _survives(tmp_path: Path, *, kills: int, seed: int, rows: int) -> None:
    """Kill the job at random moments, with one rank and two in turn, then let it finish."""
    import random

    generator = random.Random(seed)
    tree = job_settings(tmp_path / "killed", rows=rows, output__commit_s=0.05, output__shard_rows=5)
    folder, log = tmp_path / "killed/job/raw", tmp_path / "killed/log"
    seen: list[int] = []
    for number in range(kills):
        processes = start_scripted(tree, ranks=1 + number % 2, pause_s=0.02, log=log)
        before = len(shard_paths(folder))
        deadline = time.monotonic() + 120
        # Killed while it writes, not while it imports.
        while len(shard_paths(folder)) <= before and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(generator.random() * 0.3)
        kill(processes)
        answers = answers_in(folder)
        assert not repeated(answers)
        seen.append(len(answers))
    assert seen == sorted(seen) and seen[0] > 0 and seen[-1] < rows * 4, "killed too late to show anything"
    last = start_scripted(tree, ranks=2, pause_s=0.0, log=log)
    assert [process.wait(timeout=120) for process in last] == [0, 0], log.with_suffix(".0").read_text()[-2000:]
    whole = changed(tree, output__dir=str(tmp_path / "whole/job"))
    assert run_job(whole, backend=ScriptedBackend())
    assert answers_in(folder) == answers_in(tmp_path / "whole/job/raw")
    assert not list(folder.glob(".tmp-*"))


def test_killed_twice_nothing_is_lost_or_repeated(tmp_path):
    _survives(tmp_path, kills=2, seed=1, rows=400)


@pytest.mark.slow
def test_killed_ten_times_nothing_is_lost_or_repeated(tmp_path):
    _survives(tmp_path, kills=10, seed=2, rows=1000)


def test_told_to_stop_one_rank_saves_all_and_the_rest_is_written_later(tmp_path):
    tree = job_settings(tmp_path, rows=300)
    processes = start_scripted(tree, ranks=2, pause_s=0.05, log=tmp_path / "log")
    deadline = time.monotonic() + 120
    while not shard_paths(tmp_path / "job/raw") and time.monotonic() < deadline:
        time.sleep(0.02)
    processes[1].send_signal(signal.SIGTERM)
    assert [process.wait(timeout=60) for process in processes] == [3, 3], (tmp_path / "log.1").read_text()[-2000:]
    saved = answers_in(tmp_path / "job/raw")
    assert 0 < len(saved) < 1200
    rest = ScriptedBackend()
    assert run_job(tree, backend=rest) and len(rest.asked) == 1200 - len(saved)
    assert json.loads((tmp_path / "job/job.json").read_text())["identity"]["writer"] == {"kind": "scripted"}
