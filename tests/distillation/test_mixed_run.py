"""A whole tiny run on two training sets: stopped in its second epoch it goes on as if it had not stopped."""

from tiny_run import distil, distil_until, metrics, settings

STEPS = 6


def test_a_run_on_two_training_sets_resumes_bit_for_bit(tiny_assets, two_ranks, tmp_path):
    mixture = {"share": 1, "others": [{"source": str(tiny_assets / "eval.jsonl"), "share": 3}]}

    def tree(name):
        changes = {"data__mixture": mixture, "data__train__max_samples": 24, "eval__before": False}
        return settings(tiny_assets, tmp_path / name, train__max_steps=STEPS, **changes)

    two_ranks.run(distil, tree=tree("straight"))
    two_ranks.run(distil_until, tree=tree("stopped"), step=4, rank=1)
    two_ranks.run(distil, tree=tree("stopped"))
    straight, resumed = (metrics(tmp_path / name) for name in ("straight", "stopped"))
    assert [record["step"] for record in straight] == list(range(1, STEPS + 1))
    for name in ("loss", "tokens", "optim/grad_norm"):
        assert [record[name] for record in resumed] == [record[name] for record in straight]
