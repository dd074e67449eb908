"""Pictures for TensorBoard: a table of numbers as coloured squares, and the file format that they travel in."""

import struct
import zlib

import torch
from torch import Tensor

_CELL = 12
# Colours of 0, of 1 (what is even) and of HOTTEST, red, green, blue.
_COLD, _EVEN, _HOT = (49, 54, 149), (247, 247, 247), (165, 0, 38)
HOTTEST = 4.0
"""From this value on a square has the last colour."""


def heat_image(values_LX: Tensor, /) -> Tensor:
    """(3, 12·L, 12·X) uint8: one square per value, blue at 0, white at 1, red from HOTTEST on."""
    values = values_LX.detach().cpu().double()
    below, above = values.clamp(0.0, 1.0), ((values - 1.0) / (HOTTEST - 1.0)).clamp(0.0, 1.0)
    cold, even, hot = (torch.tensor(colour, dtype=torch.float64)[:, None, None] for colour in (_COLD, _EVEN, _HOT))
    mixed = torch.where(values <= 1.0, cold + (even - cold) * below, even + (hot - even) * above)
    image = mixed.round().to(torch.uint8)
    return image.repeat_interleave(_CELL, dim=1).repeat_interleave(_CELL, dim=2)


def png(image: Tensor, /) -> bytes:
    """(3, height, width) uint8 as a PNG file (ISO/IEC 15948): 8-bit RGB, no filter, no interlacing."""
    assert image.dtype == torch.uint8 and image.shape[0] == 3
    _, height, width = image.shape
    rows = image.permute(1, 2, 0).reshape(height, width * 3).contiguous().cpu()
    # Each line starts with the number of its filter.
    lines = torch.cat([torch.zeros(height, 1, dtype=torch.uint8), rows], dim=1)
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = zlib.compress(bytes(lines.numpy()))
    parts = ((b"IHDR", header), (b"IDAT", body), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, data) for kind, data in parts)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
