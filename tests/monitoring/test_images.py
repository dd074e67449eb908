"""Heat maps: their colours, their file format, and their way to TensorBoard."""

import io
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from largekd.monitoring.images import HOTTEST, heat_image, png
from largekd.monitoring.sinks import TensorBoardSink


def test_colours_tell_idle_even_and_crowded_experts_apart():
    image = heat_image(torch.tensor([[0.0, 1.0], [HOTTEST, 2 * HOTTEST]]))
    assert image.shape == (3, 24, 24) and image.dtype == torch.uint8
    cold, even, hot, hotter = image[:, 0, 0], image[:, 0, 12], image[:, 12, 0], image[:, 23, 23]
    assert cold[2] > cold[0] and (even == 247).all() and hot[0] > hot[2]
    assert torch.equal(hot, hotter) and (image[:, :12, :12] == cold[:, None, None]).all()


def test_png_reads_back():
    reader = pytest.importorskip("PIL.Image")
    image = torch.randint(0, 256, (3, 5, 7), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with reader.open(io.BytesIO(png(image))) as opened:
        assert opened.mode == "RGB" and opened.size == (7, 5)
        assert list(opened.tobytes()) == image.permute(1, 2, 0).flatten().tolist()


def test_images_reach_the_event_file_and_are_cut_back_on_resume(tmp_path: Path):
    image = heat_image(torch.rand(2, 3))
    for resume, steps in ((0, (1, 2)), (1, (3,))):
        sink = TensorBoardSink(tmp_path, resume_step=resume)
        for step in steps:
            sink.write_images(step=step, images={"router/load": image})
        sink.close()
    events = EventAccumulator(str(tmp_path), size_guidance={"images": 0})
    events.Reload()
    found = events.Images("router/load")
    assert sorted(event.step for event in found) == [1, 3]
    assert found[0].encoded_image_string == png(image) and (found[0].width, found[0].height) == (36, 24)
