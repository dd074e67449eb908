"""What the cache's codec is compared with: published layouts, written anew from their documentation for measuring.

DistillKit's distribution quantisation keeps `k` ids bit-packed, the first `exact` log-probabilities in bfloat16, and
least-squares coefficients of the rest over the rank t, in the terms t⁰ … t⁴ and √t. Here t runs from 0 to 1: over the
rank itself, as its recommended setting has it, the fit is far worse.
"""

import zlib
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True)
class PolynomialCodec:
    """344 bytes at a vocabulary of 151,936: 128 x 18 bits, 16 x 2 bytes, 6 x 4 bytes."""

    vocab_size: int
    k: int = 128
    exact: int = 16

    @property
    def id_bits(self) -> int:
        """Bits of one id."""
        return (self.vocab_size - 1).bit_length()

    @property
    def token_bytes(self) -> float:
        """Bytes of one token, without an index."""
        return self.k * self.id_bits / 8 + 2 * self.exact + 4 * self._terms().shape[1]

    def encode(self, logp_TW: Tensor) -> dict[str, NDArray]:
        """The packed record of each token."""
        logp_TK, ids_TK = logp_TW.topk(self.k, dim=-1)
        rest = logp_TK[:, self.exact :].float()
        terms = self._terms()
        fitted = torch.linalg.lstsq(terms, rest.T).solution.T
        bits = (ids_TK.numpy()[..., None] >> np.arange(self.id_bits)) & 1
        return {
            "ids": np.packbits(bits.reshape(len(bits), -1).astype(np.uint8), axis=-1),
            "exact": logp_TK[:, : self.exact].bfloat16().view(torch.int16).numpy(),
            "terms": fitted.contiguous().numpy(),
        }

    def decode(self, record: dict[str, NDArray]) -> tuple[Tensor, Tensor]:
        """int64 ids and log-probabilities."""
        bits = np.unpackbits(record["ids"], axis=-1, count=self.k * self.id_bits)
        powers = (1 << np.arange(self.id_bits)).astype(np.int32)
        ids_TK = bits.reshape(len(bits), self.k, self.id_bits).astype(np.int32) @ powers
        exact = torch.from_numpy(record["exact"]).view(torch.bfloat16).float()
        rest = torch.from_numpy(record["terms"]) @ self._terms().T
        return torch.from_numpy(ids_TK).long(), torch.cat([exact, rest], dim=-1)

    def _terms(self) -> Tensor:
        t = torch.arange(self.k - self.exact, dtype=torch.float32)
        t = t / (len(t) - 1)
        return torch.stack([*(t**power for power in range(5)), t.sqrt()], dim=-1)


@dataclass(frozen=True)
class DeflateCodec:
    """64 ids in 4 bytes and log-probabilities in 2, shuffled by byte and deflated in chunks: what HDF5's filters do."""

    k: int = 64
    chunk_tokens: int = 256

    def encode(self, logp_TW: Tensor) -> list[tuple[int, bytes]]:
        """Chunks of tokens with their counts."""
        logp_TK, ids_TK = logp_TW.topk(self.k, dim=-1)
        chunks = []
        for start in range(0, len(ids_TK), self.chunk_tokens):
            ids = ids_TK[start : start + self.chunk_tokens].int().numpy()
            logp = logp_TK[start : start + self.chunk_tokens].half().numpy()
            planes = [part.view(np.uint8).reshape(-1, part.itemsize).T.tobytes() for part in (ids, logp)]
            chunks.append((len(ids), zlib.compress(b"".join(planes), 4)))
        return chunks

    def decode(self, chunks: list[tuple[int, bytes]]) -> tuple[Tensor, Tensor]:
        """int64 ids and log-probabilities."""
        ids, logp = [], []
        for count, data in chunks:
            raw = np.frombuffer(zlib.decompress(data), np.uint8)
            values = count * self.k
            ids.append(np.ascontiguousarray(raw[: 4 * values].reshape(4, -1).T).view(np.int32).reshape(count, -1))
            logp.append(np.ascontiguousarray(raw[4 * values :].reshape(2, -1).T).view(np.float16).reshape(count, -1))
        return torch.from_numpy(np.concatenate(ids)).long(), torch.from_numpy(np.concatenate(logp)).float()
