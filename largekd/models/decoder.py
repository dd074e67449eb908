"""A causal language model seen as what distillation needs: hidden states and a vocabulary head."""

from dataclasses import dataclass

from torch import Tensor, nn
from transformers import PreTrainedModel

from largekd.contracts import Batch, VocabularyHead
from largekd.errors import ConfigError

_FLATTENING = frozenset({"flash_attention_2"})


@dataclass(frozen=True)
class HeadSpec:
    """The vocabulary head without its weights; see VocabularyHead for the formula."""

    vocab_size: int
    scale: float
    softcap: float | None

    def with_weights(self, *, weight_VD: Tensor, bias_V: Tensor | None) -> VocabularyHead:
        """The head with gathered weights."""
        return VocabularyHead(
            weight_VD=weight_VD, vocab_size=self.vocab_size, bias_V=bias_V, scale=self.scale, softcap=self.softcap
        )


class Decoder(nn.Module):
    """Holds a causal language model; its forward gives the last hidden states (after the final norm) and no logits."""

    def __init__(self, *, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        self.head_spec = head_spec(model)

    @property
    def head_weight_VD(self) -> nn.Parameter:
        """The vocabulary projection; the embedding itself where the two are tied."""
        return self.model.get_output_embeddings().weight

    @property
    def head_bias_V(self) -> nn.Parameter | None:
        """The projection's bias, in the few families that have one."""
        return getattr(self.model.get_output_embeddings(), "bias", None)

    @property
    def head_parameters(self) -> list[nn.Parameter]:
        """What must be whole for the vocabulary pass."""
        return [p for p in (self.head_weight_VD, self.head_bias_V) if p is not None]

    def forward(self, *, batch: Batch) -> Tensor:
        """Hidden states `[B, S, D]`."""
        inputs = batch.model_inputs
        shape = batch.input_ids_BS.shape
        # Flash attention finds the segments of packed rows only in one flattened row.
        if batch.position_ids_BS is not None and self.model.config._attn_implementation in _FLATTENING:
            inputs = {name: value.reshape(1, -1) for name, value in inputs.items()}
        hidden = self.model.get_decoder()(**inputs, use_cache=False, return_dict=True).last_hidden_state
        return hidden.reshape(*shape, -1)


def head_spec(model: PreTrainedModel) -> HeadSpec:
    """Scale and soft-cap of the family's logits. Errors: ConfigError when there is no plain vocabulary projection."""
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise ConfigError(f"{type(model).__name__} has no linear vocabulary head; it cannot be distilled from logits.")
    config = model.config
    scale = 1.0
    if getattr(config, "logit_scale", None) is not None:
        scale *= float(config.logit_scale)
    if getattr(config, "logits_scaling", None) is not None:
        scale /= float(config.logits_scaling)
    softcap = getattr(config, "final_logit_softcapping", None)
    return HeadSpec(vocab_size=int(config.vocab_size), scale=scale, softcap=None if softcap is None else float(softcap))


def enable_checkpointing(model: PreTrainedModel) -> None:
    """Recompute decoder blocks in the backward pass. The reentrant kind would lose gradients of captured tensors."""
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
