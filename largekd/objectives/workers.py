"""Row blocks side by side on a CPU: one Python thread per core, each with single-threaded operations.

Splitting every small operation over the cores instead would meet a barrier after each of them, tens of thousands of
times per pass, and each barrier lasts a scheduler's time slice once another process wants one of the cores. Whole
blocks also stay in the cache of the core that works on them.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Result = TypeVar("Result")


def map_spans(task: Callable[[slice], Result], /, *, size: int, block: int, device: torch.device) -> Sequence[Result]:
    """task(span) for contiguous spans that cover [0, size), in order; whole blocks, a span per core on a CPU.

    An accelerator gets one span: its queue is fed by one thread. Gradients are off inside of tasks.
    """
    threads = torch.get_num_threads() if device.type == "cpu" else 1
    spans = _spans(size, block=block, parts=threads)
    if len(spans) <= 1:
        return [task(span) for span in spans]

    def work(span: slice) -> Result:
        with torch.no_grad():  # the mode belongs to a thread
            return task(span)

    try:
        with ThreadPoolExecutor(len(spans), initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(work, spans))
    finally:
        torch.set_num_threads(threads)  # the setting is a thread's own, but also the default of threads to come


def _spans(size: int, /, *, block: int, parts: int) -> list[slice]:
    blocks = -(-size // block)
    step = max(1, -(-blocks // parts)) * block
    return [slice(start, min(start + step, size)) for start in range(0, size, step)]
