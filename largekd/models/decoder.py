"""A causal language model seen as what distillation needs: hidden states and a vocabulary head."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from largekd.contracts import AttentionInputs, Batch, RouterTap, TapRequest, Taps, VocabularyHead
from largekd.errors import ConfigError
from largekd.models.adapters import ADAPTERS_KEY, AdapterUse
from largekd.models.depth import leaving_out
from largekd.models.taps import ScoreRule, capturing

logger = logging.getLogger(__name__)

_FLATTENING = frozenset({"flash_attention_2"})
_NO_TAPS = TapRequest()

PROVEN_FAMILIES = frozenset(
    {
        "cohere",
        "cohere2",
        "gemma",
        "gemma2",
        "gemma3_text",
        "gpt_neox",
        "granite",
        "llama",
        "mistral",
        "mixtral",
        "olmo2",
        "olmoe",
        "phi3",
        "qwen2",
        "qwen3",
        "qwen3_moe",
    }
)
"""Model types whose own logits a test compares with the head's formula."""

_FINAL_NORMS = ("norm", "final_layernorm", "final_layer_norm", "final_norm", "ln_f")

# Factors that some families put between hidden states and logits, and that the formula does not have.
_UNKNOWN_FACTORS = ("lm_head_multiplier", "output_multiplier", "logits_mup_width_multiplier", "dim_model_base")


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
    """Holds a causal language model; its forward gives the last hidden states and what is tapped, and no logits."""

    def __init__(self, *, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        self.head_spec = head_spec(model)
        self._rules: dict[int, ScoreRule] = {}

    @property
    def head_weight(self) -> nn.Parameter:
        """The vocabulary projection; the embedding itself where the two are tied."""
        return self.model.get_output_embeddings().weight

    @property
    def head_bias(self) -> nn.Parameter | None:
        """The projection's bias, in the few families that have one."""
        return getattr(self.model.get_output_embeddings(), "bias", None)

    @property
    def head_parameters(self) -> list[nn.Parameter]:
        """What must be whole for the vocabulary pass."""
        return [p for p in (self.head_weight, self.head_bias) if p is not None]

    @property
    def final_norm(self) -> nn.Module | None:
        """What stands between the last layer and the head; None for a family that keeps it elsewhere."""
        decoder = self.model.get_decoder()
        found = [getattr(decoder, name) for name in _FINAL_NORMS if isinstance(getattr(decoder, name, None), nn.Module)]
        return found[0] if len(found) == 1 else None

    def forward(
        self,
        *,
        batch: Batch,
        taps: TapRequest = _NO_TAPS,
        adapters: AdapterUse | None = None,
        left_out: Sequence[int] = (),
    ) -> dict[str, Tensor]:
        """`last`: hidden states after the final norm, (B, S, D); and per tapped layer i, see `taps_of`:

        `hidden.<i>` (B, S, D); `attention.<i>.query` (B, H, S, d), `.key` and `.value` (B, G, S, d);
        `router.<i>.logits` (B, S, X) and `.choice` (B, S, K).
        adapters: for a model that `adapt` has given some, which of them; see AdapterUse. None: the student's.
        left_out: layers that hand their input on; what they would have attended with cannot be tapped.
        """
        inputs: dict[str, Any] = batch.model_inputs | ({} if adapters is None else {ADAPTERS_KEY: adapters})
        rows, positions = batch.input_ids_BS.shape
        # Flash attention finds the segments of packed rows only in one flattened row.
        flat = batch.position_ids_BS is not None and self.model.config._attn_implementation in _FLATTENING
        if flat:
            inputs |= {name: value.reshape(1, -1) for name, value in batch.model_inputs.items()}
        with leaving_out(self.model, layers=left_out), capturing(self.model, request=taps) as capture:
            last = self.model.get_decoder()(**inputs, use_cache=False, return_dict=True).last_hidden_state
        assert capture.covers(taps)
        outputs = {"last": last.reshape(rows, positions, -1)}
        for layer, hidden in capture.hidden.items():
            outputs[f"hidden.{layer}"] = hidden.reshape(rows, positions, -1)
        for layer, (logits, choice) in capture.router.items():
            outputs[f"router.{layer}.logits"] = logits.reshape(rows, positions, -1)
            outputs[f"router.{layer}.choice"] = choice.reshape(rows, positions, -1)
        for layer, captured in capture.attention.items():
            for name, tensor in zip(("query", "key", "value"), captured, strict=True):
                # (1, heads, B·S, d) -> (B, heads, S, d)
                unflat = tensor.squeeze(0).unflatten(1, (rows, positions)).transpose(0, 1) if flat else tensor
                outputs[f"attention.{layer}.{name}"] = unflat
        self._rules.update(capture.rules)
        return outputs

    def taps_of(self, outputs: Mapping[str, Tensor]) -> Taps:
        """The tapped activations among what `forward` returned, as records; called outside of any module's forward."""
        hidden, layers, routers = {}, set(), set()
        for name in outputs:
            kind, _, rest = name.partition(".")
            if kind == "hidden":
                hidden[int(rest)] = outputs[name]
            elif kind == "attention":
                layers.add(int(rest.split(".")[0]))
            elif kind == "router":
                routers.add(int(rest.split(".")[0]))
        attention = {
            layer: AttentionInputs(
                query_BHSd=outputs[f"attention.{layer}.query"],
                key_BGSd=outputs[f"attention.{layer}.key"],
                value_BGSd=outputs[f"attention.{layer}.value"],
                scale=self._rules[layer].scale,
                window=self._rules[layer].window,
                softcap=self._rules[layer].softcap,
            )
            for layer in sorted(layers)
        }
        router = {
            layer: RouterTap(logits_BSX=outputs[f"router.{layer}.logits"], choice_BSK=outputs[f"router.{layer}.choice"])
            for layer in sorted(routers)
        }
        return Taps(hidden=hidden, attention=attention, router=router)


def head_spec(model: PreTrainedModel) -> HeadSpec:
    """Scale and soft-cap of the family's logits. Errors: ConfigError when there is no plain vocabulary projection."""
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise ConfigError(f"{type(model).__name__} has no linear vocabulary head; it cannot be distilled from logits.")
    config = model.config
    for name in _UNKNOWN_FACTORS:
        if getattr(config, name, None) not in (None, 1, 1.0):
            raise ConfigError(
                f"{type(model).__name__}: config.json sets {name} = {getattr(config, name)}, a factor of the logits "
                "that is not supported; a loss without it would be wrong. Choose another model."
            )
    if config.model_type not in PROVEN_FAMILIES:
        logger.warning("model type %r: its logits are taken to be hidden states times the head", config.model_type)
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
