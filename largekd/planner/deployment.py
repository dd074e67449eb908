"""Budgets of the places where a student runs."""

from collections.abc import Mapping
from dataclasses import dataclass

from largekd.config.design import Deployment, DesignConfig, Storage

DEFAULT_CONTEXT = 2048


@dataclass(frozen=True)
class Budget:
    """Bytes for weights, keys and values; `source` says where the figure is from and how sure it is."""

    name: str
    bytes: int
    storage: Storage
    context_tokens: int
    source: str


PRESETS: Mapping[Deployment, Budget] = {
    "edge": Budget(
        "edge",
        1_000_000_000,
        "int4",
        2048,
        "a convention: half of a board with 2 GB; no reliable figure, boards have from 0.5 to 64 GB",
    ),
    "mobile": Budget(
        "mobile",
        600_000_000,
        "int4",
        2048,
        "a tenth of a phone's 6 GB, the share that MobileLLM (arXiv 2402.14905) grants one app; phones with 12 GB "
        "give twice as much, and vendors' own assistants take more",
    ),
    "browser": Budget(
        "browser",
        2_000_000_000,
        "int4",
        2048,
        "half of the 4 GB that 32-bit WebAssembly can address; what a tab may hold on the GPU differs by a factor of "
        "several between machines and cannot be asked for",
    ),
    "server": Budget(
        "server",
        19_200_000_000,
        "bf16",
        8192,
        "80 % of one accelerator with 24 GB and a single sequence, a convention; many sequences at once need "
        "memory_bytes and a longer context_tokens",
    ),
}
"""The values of `student.design.deploy`; orders of magnitude, replaced by memory_bytes where the device is known."""


def read_budget(design: DesignConfig) -> Budget | None:
    """The budget that a design names, with its own storage and context where it gives them."""
    if design.deploy is not None:
        preset = PRESETS[design.deploy]
        return Budget(
            preset.name,
            preset.bytes,
            design.storage or preset.storage,
            design.context_tokens or preset.context_tokens,
            preset.source,
        )
    if design.memory_bytes is not None:
        storage, context = design.storage or "bf16", design.context_tokens or DEFAULT_CONTEXT
        return Budget("memory", design.memory_bytes, storage, context, "given")
    return None
