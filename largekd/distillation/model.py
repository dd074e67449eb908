"""Everything trainable in one module, so that ZeRO-3's hooks see every use of every weight."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from largekd.contracts import Batch, HiddenSignal, MixtureSignal, SampledSignal, TeacherSignal, TopKSignal
from largekd.models.decoder import Decoder
from largekd.models.lora import plain_name
from largekd.objectives.alignment import Alignment
from largekd.objectives.options import PLAIN, PassOptions
from largekd.objectives.router import RouterTerms
from largekd.objectives.vocabulary import VocabularyPass
from largekd.sharding.shards import register_external

_STUDENT_PREFIX = "student.model."


class DistillModel(nn.Module):
    """The student and the losses. Its forward gives a dict with the scalar `loss` and the terms' sums.

    Terms are ordered as the objective's summands: those of the vocabulary pass, then the alignment, then the routers',
    then those of the vocabulary pass for each of `deep_layers`; the last two are left out (their sums are 0) in
    evaluation mode.
    """

    def __init__(
        self,
        *,
        student: Decoder,
        vocabulary: VocabularyPass,
        alignment: Alignment | None = None,
        deep_layers: Sequence[int] = (),
        router: RouterTerms | None = None,
    ) -> None:
        super().__init__()
        self.deep_layers = tuple(deep_layers)
        self.student = student
        self.vocabulary = vocabulary
        self.alignment = alignment
        self.router = router
        for parameter in student.head_parameters:
            register_external(vocabulary, parameter)

    def forward(
        self, *, batch: Batch, signal: TeacherSignal | None, scales: Tensor, options: PassOptions = PLAIN
    ) -> dict[str, Tensor]:
        """`scales[n]` multiplies the sum of term n; see VocabularyPass for the other figures that are returned.

        With `options.term_gradients` also `alignment_squares`, which the backward pass fills with the squared norm of
        each alignment term's gradient with respect to the student's captured activations, `deep_squares` of the
        intermediate layers' terms, and `router_squares`. With routers also `router`, see RouterLoads.
        """
        first_deep = len(scales) - len(self.vocabulary.terms) * len(self.deep_layers)
        first_router = first_deep - (0 if self.router is None else len(self.router.terms))
        deep = self.deep_layers if self.training else ()
        taps = options.plan.student
        taps = replace(taps, hidden=tuple(sorted({*taps.hidden, *deep}))) if deep else taps
        outputs = self.student(batch=batch, taps=taps, left_out=options.left_out)
        given: dict[str, Any] = {"batch": batch, "signal": signal, "options": options}
        results = self.losses(outputs, scales=scales[:first_router], **given)
        if self.router is not None:
            results = self._with_routers(results, outputs, scales=scales[first_router:first_deep], **given)
        if self.deep_layers:
            results = self._with_deep(results, outputs, layers=deep, scales=scales[first_deep:], **given)
        return results

    def losses(
        self,
        outputs: Mapping[str, Tensor],
        *,
        batch: Batch,
        signal: TeacherSignal | None,
        scales: Tensor,
        options: PassOptions,
    ) -> dict[str, Tensor]:
        """What the last layer and the alignment add to what `forward` gives; called inside of it."""
        terms = len(self.vocabulary.terms)
        results = self.read_head(outputs["last"], batch=batch, signal=signal, scales=scales[:terms], options=options)
        if self.alignment is None:
            return results
        if not options.plan.pairs:
            return _with_zeros(results, count=len(scales) - terms)
        assert signal is not None, "alignment needs the teacher's captured activations"
        squares_N = scales.new_zeros(len(scales) - terms) if options.term_gradients else None
        sums_N = self.alignment(
            self.student.taps_of(outputs), signal.taps, batch=batch, plan=options.plan, squares_N=squares_N
        )
        results = _with_sums(results, sums_N, scales=scales[terms:])
        return results if squares_N is None else results | {"alignment_squares": squares_N}

    def read_head(
        self,
        hidden_BSD: Tensor,
        *,
        batch: Batch,
        signal: TeacherSignal | None,
        scales: Tensor,
        options: PassOptions,
        vocabulary: VocabularyPass | None = None,
    ) -> dict[str, Tensor]:
        """The terms of `vocabulary`, by default the student's own, of states that its head reads."""
        spec = self.student.head_spec
        results: dict[str, Tensor] = (vocabulary or self.vocabulary)(
            hidden_BSD,
            self.student.head_weight,
            self.student.head_bias,
            head_scale=spec.scale,
            softcap=spec.softcap,
            vocab_size=spec.vocab_size,
            batch=batch,
            signal=signal if isinstance(signal, HiddenSignal | TopKSignal | SampledSignal | MixtureSignal) else None,
            scales=scales,
            temperature=options.temperature,
            limit=options.limit,
            measure=options.measure,
            term_gradients=options.term_gradients,
        )
        return results

    def _with_routers(
        self,
        results: dict[str, Tensor],
        outputs: Mapping[str, Tensor],
        *,
        batch: Batch,
        signal: TeacherSignal | None,
        scales: Tensor,
        options: PassOptions,
    ) -> dict[str, Tensor]:
        """`results` with what the routers add."""
        assert self.router is not None
        if options.load_LX is None or not self.training:
            return _with_zeros(results, count=len(scales))
        squares_N = torch.zeros_like(scales) if options.term_gradients else None
        sums_N, figures = self.router(
            self.student.taps_of(outputs),
            None if signal is None else signal.taps,
            batch=batch,
            load_LX=options.load_LX,
            squares_N=squares_N,
        )
        results = _with_sums(results, sums_N, scales=scales) | {"router": figures}
        return results if squares_N is None else results | {"router_squares": squares_N}

    def _with_deep(
        self,
        results: dict[str, Tensor],
        outputs: Mapping[str, Tensor],
        *,
        layers: Sequence[int],
        scales: Tensor,
        options: PassOptions,
        **given: Any,
    ) -> dict[str, Tensor]:
        """`results` with the vocabulary terms of `layers`, read through the final norm and the head."""
        if not layers:
            return _with_zeros(results, count=len(scales))
        norm = self.student.final_norm
        assert norm is not None
        # A selection of tokens, and health figures, are of the last layer alone.
        options = replace(options, limit=None, measure=False)
        found = [
            self.read_head(norm(outputs[f"hidden.{layer}"]), scales=part, options=options, **given)
            for layer, part in zip(layers, scales.split(len(self.vocabulary.terms)), strict=True)
        ]
        loss, sums = results["loss"], torch.cat([results["sums"], *(layer["sums"] for layer in found)])
        for layer in found:
            loss = loss + layer["loss"]
        results = results | {"loss": loss, "sums": sums}
        if options.term_gradients:
            results["deep_squares"] = torch.cat([layer["squares"] for layer in found])
        return results

    def named_trainables(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Parameters under the names that a user knows: the student's as in its Hugging Face checkpoint, those of
        alignment terms as `alignment.terms.<term>.…`."""
        for name, parameter in self.named_parameters():
            yield plain_name(name.removeprefix(_STUDENT_PREFIX)), parameter


def _with_sums(results: dict[str, Tensor], sums_N: Tensor, *, scales: Tensor) -> dict[str, Tensor]:
    """`results` with further terms, in the loss and among the sums."""
    return results | {
        "loss": results["loss"] + (sums_N * scales).sum(),
        "sums": torch.cat([results["sums"], sums_N.detach().to(results["sums"].dtype)]),
    }


def _with_zeros(results: dict[str, Tensor], *, count: int) -> dict[str, Tensor]:
    """`results` with the sums of terms that take no part."""
    return results | {"sums": torch.cat([results["sums"], results["sums"].new_zeros(count)])}
