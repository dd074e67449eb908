"""Templates: every one of the package renders, a user's own is used, what is missing is named."""

import pytest

from largekd.config.generate import PromptConfig, SamplingConfig
from largekd.curation.records import Item
from largekd.errors import ConfigError, DataError
from largekd.factory.asks import Asker
from largekd.factory.prompts import load_prompter, template_names

EVERYTHING = {
    "question": "How many legs have three cats?",
    "answer": "12",
    "examples": [{"question": "2+2?", "answer": "4"}],
    "persona": "a child of eight",
    "conversation": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Good day"}],
    "topic": "tides",
    "task": "explain",
    "text": "Three cats have 12 legs.",
}


def test_there_is_a_template_for_every_kind():
    wanted = {
        "step_by_step",
        "structured",
        "socratic",
        "program_of_thought",
        "direct",
        "critique_and_revise",
        "few_shot",
        "few_shot_turns",
    }
    assert wanted | {"instruction", "persona", "rewrite", "judge"} <= set(template_names())


@pytest.mark.parametrize("name", template_names())
def test_every_template_renders_and_leaves_no_code_behind(name):
    messages = load_prompter(name, key="prompts").messages(EVERYTHING, row="r1")
    turns = len(EVERYTHING["examples"]) if name == "few_shot_turns" else 0
    roles = [message["role"] for message in messages]
    assert roles[-1 - 2 * turns :] == [*["user", "assistant"] * turns, "user"]
    assert roles[: -1 - 2 * turns] in ([], ["system"])
    text = messages[-1]["content"]
    assert (
        text == text.strip()
        and len(text) >= len(EVERYTHING["question"])
        and "{{" not in text
        and "{%" not in text
        and "\n\n\n" not in text
    )
    if name not in ("critique_and_revise", "user_turn", "new_instruction", "similar_instruction"):
        assert EVERYTHING["question"] in text


def test_a_rows_text_is_never_template_code():
    question = "{{ 7 * 7 }}{% raw %} <b>&amp;</b>"
    (message,) = load_prompter("instruction", key="prompts").messages({"question": question}, row="r1")
    assert message["content"] == question


def test_a_missing_variable_names_template_row_and_column():
    with pytest.raises(DataError, match=r"'persona', row r1: 'persona' is undefined.*question"):
        load_prompter("persona", key="prompts").messages({"question": "Why?"}, row="r1")


def test_a_users_template_is_read_from_its_file_and_told_by_its_text(tmp_path):
    path = tmp_path / "mine.jinja"
    path.write_text("{% block user %}{{ question }} ({{ tone }}){% endblock %}")
    asker = Asker(PromptConfig(templates=(str(path),), variables={"tone": "gently"}), SamplingConfig())
    (ask,) = asker.asks([Item("r1", "Why?")])
    assert ask.messages == ({"role": "user", "content": "Why? (gently)"},) and ask.template == "mine"
    before = asker.digests()
    path.write_text("{% block user %}{{ question }}{% endblock %}")
    after = Asker(asker.prompts, asker.sampling).digests()
    assert after.keys() == before.keys() and after != before


@pytest.mark.parametrize(
    ("text", "told"),
    [("{% block user %}{{ question ", "cannot be used"), ("{{ question }}", "no block `user`"), (None, "no file")],
)
def test_a_file_that_is_no_template_is_refused(tmp_path, text, told):
    path = tmp_path / "bad.jinja"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=told):
        load_prompter(str(path), key="prompts.templates.0")


def test_a_template_reaches_nothing_of_python(tmp_path):
    path = tmp_path / "sly.jinja"
    path.write_text("{% block user %}{{ question.__class__.__mro__ }}{% endblock %}")
    with pytest.raises(DataError, match="sly"):
        load_prompter(str(path), key="prompts").messages({"question": "Why?"}, row="r1")


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ConfigError, match="step_by_step"):
        load_prompter("step_by_stepp", key="prompts.templates.0")


def test_examples_are_drawn_by_the_row_and_never_its_own(tmp_path):
    path = tmp_path / "shots.jsonl"
    path.write_text("".join(f'{{"question": "q{n}", "answer": "a{n}"}}\n' for n in range(5)))
    prompts = PromptConfig(templates=("few_shot",), few_shot=str(path), few_shot_count=4)
    asks = Asker(prompts, SamplingConfig()).asks([Item(f"r{n}", f"q{n}") for n in range(5)])
    for number, ask in enumerate(asks):
        text = ask.messages[0]["content"]
        assert f"a{number}" not in text and text.count("Question:") == 5
    assert asks == Asker(prompts, SamplingConfig()).asks([Item(f"r{n}", f"q{n}") for n in range(5)])


def test_worked_examples_become_earlier_turns(tmp_path):
    path = tmp_path / "shots.jsonl"
    path.write_text("".join(f'{{"question": "q{n}", "answer": "a{n}"}}\n' for n in range(3)))
    prompts = PromptConfig(templates=("few_shot_turns",), few_shot=str(path), few_shot_count=2, system="Be brief.")
    (ask,) = Asker(prompts, SamplingConfig()).asks([Item("r1", "q1")])
    assert [message["role"] for message in ask.messages] == ["system", *["user", "assistant"] * 2, "user"]
    texts = [message["content"] for message in ask.messages]
    assert texts[0] == "Be brief." and texts[-1] == "q1"
    assert {(texts[1], texts[2]), (texts[3], texts[4])} == {("q0", "a0"), ("q2", "a2")}


def test_examples_as_turns_need_examples_and_both_blocks(tmp_path):
    with pytest.raises(DataError, match=r"prompts\.few_shot"):
        load_prompter("few_shot_turns", key="prompts").messages({"question": "Why?"}, row="r1")
    half = tmp_path / "half.jinja"
    half.write_text("{% block example_user %}x{% endblock %}{% block user %}y{% endblock %}")
    with pytest.raises(ConfigError, match="belong together"):
        load_prompter(str(half), key="prompts")


def test_samples_have_seeds_and_temperatures_of_their_own():
    sampling = SamplingConfig(samples=5, temperatures=(0.2, 0.9), seed=3)
    asks = Asker(PromptConfig(), sampling).asks([Item("r1", "Why?"), Item("r2", "Why?")])
    assert [ask.draw.temperature for ask in asks[:5]] == [0.2, 0.9, 0.2, 0.9, 0.2]
    assert len({ask.seed for ask in asks}) == len({ask.key for ask in asks}) == 10
