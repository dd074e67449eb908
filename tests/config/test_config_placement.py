import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from largekd.config.checks import check_world
from largekd.config.load import parse_config
from largekd.config.placement import offload_device, read_placement, read_placements
from largekd.config.placement_schema import OWNERS, REMOVED, REMOVED_ZERO, AioConfig, PlacementConfig, ZeroConfig
from largekd.errors import ConfigError

CHECKOUT = Path(__file__).resolve().parents[2]
Changed = Callable[[str, object], dict[str, Any]]
FILES = sorted((CHECKOUT / "ds_configs").glob("*.json"))


def written(tmp_path: Path, tree: Any) -> str:
    path = tmp_path / "placement.json"
    path.write_text(tree if isinstance(tree, str) else json.dumps(tree), encoding="utf-8")
    return str(path)


def refusal(tmp_path: Path, tree: Any) -> str:
    path = written(tmp_path, tree)
    with pytest.raises(ConfigError) as caught:
        read_placement(path, key="student.deepspeed")
    assert "placement.json" in str(caught.value)
    assert "student.deepspeed" in str(caught.value)
    return str(caught.value)


def zero(**keys: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": 3, **keys}}


@pytest.mark.parametrize("file", FILES, ids=lambda path: path.name)
def test_shipped_files_are_read_unchanged(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LARGEKD_NVME_DIR", raising=False)
    read = read_placement(str(file), key="student.deepspeed")
    expected = json.loads(file.read_text(encoding="utf-8"))
    for offload in (expected["zero_optimization"].get(name, {}) for name in ("offload_param", "offload_optimizer")):
        if "nvme_path" in offload:
            offload["nvme_path"] = str(Path("runs/nvme").absolute())
    assert read == expected


def test_every_key_is_one_of_deepspeeds() -> None:
    zero_config = pytest.importorskip("deepspeed.runtime.zero.config")
    offload = pytest.importorskip("deepspeed.runtime.zero.offload_config")
    aio = pytest.importorskip("deepspeed.runtime.swap_tensor.aio_config")

    def names(model: Any) -> set[str]:
        return {field.alias or name for name, field in model.model_fields.items()}

    ours = {name: field for name, field in ZeroConfig.model_fields.items()}
    assert set(ours) <= names(zero_config.DeepSpeedZeroConfig)
    for key, theirs in [
        ("offload_param", offload.DeepSpeedZeroOffloadParamConfig),
        ("offload_optimizer", offload.DeepSpeedZeroOffloadOptimizerConfig),
    ]:
        record = next(inner for inner in ours[key].annotation.__args__ if hasattr(inner, "model_fields"))
        assert set(record.model_fields) <= names(theirs)
    assert set(AioConfig.model_fields) == set(aio.AIO_DEFAULT_DICT)


def test_defaults_are_deepspeeds() -> None:
    zero_config = pytest.importorskip("deepspeed.runtime.zero.config")
    theirs = zero_config.DeepSpeedZeroConfig(stage=3)
    by_key = {field.alias or name: getattr(theirs, name) for name, field in type(theirs).model_fields.items()}
    ours = PlacementConfig.model_validate(zero()).zero_optimization
    for name in ZeroConfig.model_fields:
        if name not in ("stage", "leaf_module"):
            assert getattr(ours, name) == by_key[name], name


def test_removed_keys_are_those_that_deepspeed_refuses() -> None:
    ds_config = pytest.importorskip("deepspeed.runtime.config")
    assert set(ds_config._REMOVED_TOP_LEVEL_CONFIG_KEYS) <= set(REMOVED)
    assert set(ds_config._REMOVED_ZERO_CONFIG_KEYS) <= set(REMOVED_ZERO)


@pytest.mark.parametrize("key", sorted(OWNERS))
def test_a_key_that_the_run_configuration_owns_is_refused_with_its_owner(tmp_path: Path, key: str) -> None:
    text = refusal(tmp_path, {**zero(), key: {"enabled": True}})
    assert f"{key}: the run configuration owns this; remove it here and set {OWNERS[key]}" in text
    assert "\n" not in text


def test_the_owners_exist(with_key: Changed) -> None:
    config = parse_config(with_key("train.seed", 0))
    for owner in OWNERS.values():
        here: Any = config
        for part in owner.split(",")[0].split(":")[0].split("."):
            here = getattr(here, part)


@pytest.mark.parametrize(
    ("tree", "expected"),
    [
        ({**zero(), "elasticity": {}}, "elasticity: DeepSpeed removed this key"),
        (zero(mics_shard_size=2), "zero_optimization.mics_shard_size: no longer a key; MiCS is gone"),
        (zero(cpu_offload=True), "use offload_optimizer"),
        (zero(reduce_bucket_size="auto"), 'zero_optimization.reduce_bucket_size = "auto": nothing fills this in'),
        ({**zero(), "zero_optimisation": {}}, "zero_optimisation: unknown key; did you mean zero_optimization?"),
        (zero(offload_params={}), "did you mean zero_optimization.offload_param?"),
        ({"zero_optimization": {"stage": 2}}, "zero_optimization.stage = 2: must be 3"),
        ({}, "zero_optimization: required, but not set"),
        (
            zero(offload_param={"device": "gpu"}),
            "zero_optimization.offload_param.device = 'gpu': must be one of 'none'",
        ),
        (zero(offload_param={"device": "nvme"}), "needs nvme_path"),
        (zero(overlap_comm="maybe"), "zero_optimization.overlap_comm = 'maybe': must be true or false"),
        ([1], "must be a JSON object"),
        ('{"a": 1,}', "line 1, column"),
        ('{"zero_optimization": {"stage": 3}, "zero_optimization": {}}', "the key 'zero_optimization' appears twice"),
    ],
)
def test_refusals(tmp_path: Path, tree: Any, expected: str) -> None:
    assert expected in refusal(tmp_path, tree)


def test_all_problems_of_a_file_are_told_once(tmp_path: Path) -> None:
    text = refusal(tmp_path, {**zero(stage=1, x_y_z=3), "bf16": {"enabled": "auto"}})
    assert "4 problems" in text
    assert text.count("bf16:") == 1


def test_numbers_may_be_written_with_an_exponent(tmp_path: Path) -> None:
    path = written(tmp_path, '{"zero_optimization": {"stage": 3, "reduce_bucket_size": 5e8}}')
    size = read_placement(path, key="k")["zero_optimization"]["reduce_bucket_size"]
    assert size == 500_000_000
    assert isinstance(size, int)


def test_a_file_is_found_from_the_current_directory_then_from_the_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "overlap_comm" in read_placement("ds_configs/zero3.json", key="k")["zero_optimization"]
    (tmp_path / "ds_configs").mkdir()
    (tmp_path / "ds_configs" / "zero3.json").write_text(json.dumps(zero()), encoding="utf-8")
    assert "overlap_comm" not in read_placement("ds_configs/zero3.json", key="k")["zero_optimization"]
    with pytest.raises(ConfigError) as caught:
        read_placement("absent.json", key="teacher.deepspeed")
    assert str(tmp_path / "absent.json") in str(caught.value)
    assert str(CHECKOUT / "absent.json") in str(caught.value)


def test_nvme_folders_come_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    offload = {"device": "nvme", "nvme_path": "${KD_DISK:-fallback}/x"}
    path = written(tmp_path, zero(offload_param=offload))
    monkeypatch.chdir(tmp_path)

    def folder() -> str:
        return read_placement(path, key="k")["zero_optimization"]["offload_param"]["nvme_path"]

    monkeypatch.delenv("KD_DISK", raising=False)
    assert folder() == str(tmp_path / "fallback" / "x")
    monkeypatch.setenv("KD_DISK", "/disk")
    assert folder() == "/disk/x"
    path = written(tmp_path, zero(offload_param={**offload, "nvme_path": "${KD_NOWHERE}"}))
    with pytest.raises(ConfigError, match=r"nvme_path.*set the environment variable KD_NOWHERE"):
        folder()


def test_models_and_runs_do_not_share_a_swap_folder(with_key: Changed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LARGEKD_NVME_DIR", "/disk")

    def folders(run_dir: str) -> list[str]:
        tree = with_key("teacher.deepspeed", "ds_configs/teacher_nvme.json")
        tree["student"]["deepspeed"] = "ds_configs/zero3_param_nvme.json"
        tree["run"]["dir"] = run_dir
        placements = read_placements(parse_config(tree))
        return [
            side["zero_optimization"]["offload_param"]["nvme_path"] for side in (placements.teacher, placements.student)
        ]

    first, second = folders("a/run"), folders("b/run")
    assert len({*first, *second}) == 4
    assert all(path.startswith("/disk/run-") for path in first)
    assert folders("a/run") == first


def test_an_optimizer_on_nvme_cannot_be_resumed(with_key: Changed) -> None:
    tree = with_key("student.deepspeed", "ds_configs/zero3_nvme.json")
    with pytest.raises(ConfigError, match=r"a resumed run would be wrong.*zero3_cpu\.json.*checkpoint\.every_steps=0"):
        read_placements(parse_config(tree))
    tree["checkpoint"] = {"every_steps": 0}
    placements = read_placements(parse_config(tree))
    assert offload_device(placements.student, "offload_optimizer") == "nvme"
    assert offload_device(placements.teacher, "offload_optimizer") == "none"


@pytest.mark.parametrize(("world_size", "accumulation"), [(1, 4), (2, 2), (4, 1)])
def test_accumulation_follows_from_ranks(with_key: Changed, world_size: int, accumulation: int) -> None:
    assert check_world(parse_config(with_key("train.seed", 0)), world_size=world_size) == accumulation


@pytest.mark.parametrize("world_size", [3, 8])
def test_a_batch_that_ranks_do_not_divide_is_refused_with_the_numbers(with_key: Changed, world_size: int) -> None:
    with pytest.raises(
        ConfigError, match=rf"train\.global_batch_size = 8: .*{world_size} ranks x train\.micro_batch_size = 2.*"
    ):
        check_world(parse_config(with_key("train.seed", 0)), world_size=world_size)
