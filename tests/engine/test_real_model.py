"""The placement promises on a real model: SmolLM2-135M as teacher and as student, where it has been fetched."""

import os
from pathlib import Path

import pytest
from placements import needs_libaio, offload
from sharding_jobs import hidden_and_residency
from step_jobs import weights_after
from tiny_run import ROOT

SMOLLM2 = Path(os.environ.get("LARGEKD_ASSETS", ROOT / "assets")) / "smollm2-135m-instruct"
RUN = {"rows": 4, "packed": True, "micro_batch_size": 2, "lr": 1e-4, "clipping": 1.0, "watch": False}
MODELS = {"teacher": str(SMOLLM2), "student": str(SMOLLM2)}
# Teacher and student are the same model here, so that cross-entropy is what drives the student away from it.
OBJECTIVE = {"alpha": 0.5, "divergences": [{"name": "forward_kl"}]}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (SMOLLM2 / "config.json").is_file(),
        reason="SmolLM2 is not here: python tools/fetch_assets.py smollm2-135m-instruct",
    ),
]


def test_a_rank_holds_its_share_of_the_teacher(two_ranks):
    whole_bytes = 134_515_008 * 2
    for result in two_ranks.run(hidden_and_residency, folder=str(SMOLLM2), precision="bf16"):
        assert result["held"] == pytest.approx(whole_bytes / 2, rel=0.01)


@needs_libaio
@pytest.mark.timeout(1200)  # five jobs of a real model
def test_offload_changes_nothing(two_ranks, tmp_path):
    def losses(steps, **placement):
        two_ranks.close()  # what DeepSpeed keeps of an engine that was taken down would add up to the machine's memory
        return two_ranks.run(weights_after, steps=steps, objective=OBJECTIVE, **RUN, **MODELS, **placement)[0]["losses"]

    plain = losses(10)
    for device in ("cpu", "nvme"):
        # The swap buffers of NVMe offload must hold the largest parameter, the embedding.
        teacher = offload(device, folder=tmp_path / "teacher")
        student = offload(device, folder=tmp_path / "student", optimizer=True)
        for placement in (teacher, student):
            if device == "nvme":
                placement["zero_optimization"]["offload_param"] |= {"buffer_count": 5, "buffer_size": 32_000_000}
        assert losses(2, teacher_zero=teacher) == plain[:2]
        offloaded = losses(10, student_zero=student)
        assert offloaded[0] == plain[0]
        assert offloaded == pytest.approx(plain, rel=1e-5)
