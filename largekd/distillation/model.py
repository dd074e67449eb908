"""Everything trainable in one module, so that ZeRO-3's hooks see every use of every weight."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from largekd.contracts import Batch, HiddenSignal, MixtureSignal, SampledSignal, TeacherSignal, TopKSignal
from largekd.models.decoder import Decoder
from largekd.models.lora import plain_name
from largekd.objectives.alignment import Alignment, AlignmentPlan
from largekd.objectives.router import RouterTerms
from largekd.objectives.vocabulary import VocabularyPass
from largekd.sharding.shards import register_external

_STUDENT_PREFIX = "student.model."
NO_PLAN = AlignmentPlan()


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
        self,
        *,
        batch: Batch,
        signal: TeacherSignal | None,
        scales: Tensor,
        plan: AlignmentPlan = NO_PLAN,
        temperature: Tensor | None = None,
        limit: Tensor | None = None,
        load: Tensor | None = None,
        measure: bool = False,
        term_gradients: bool = False,
        left_out: Sequence[int] = (),
    ) -> dict[str, Tensor]:
        """`scales[n]` multiplies the sum of term n; see VocabularyPass for the other figures that are returned.

        A plan without pairs leaves the alignment out; its sums are then 0. With `term_gradients` also
        `alignment_squares`, which the backward pass fills with the squared norm of each alignment term's gradient with
        respect to the student's captured activations, and `deep_squares` of the intermediate layers' terms, and
        `router_squares`. `load` is the share of each expert, (layers, X); with routers also `router`, see RouterLoads.
        left_out: layers of the student that hand their input on.
        """
        first_deep = len(scales) - len(self.vocabulary.terms) * len(self.deep_layers)
        deep = self.deep_layers if self.training else ()
        taps = replace(plan.student, hidden=tuple(sorted({*plan.student.hidden, *deep}))) if deep else plan.student
        outputs = self.student(batch=batch, taps=taps, left_out=left_out)
        options: dict[str, Any] = {
            "batch": batch,
            "signal": signal,
            "temperature": temperature,
            "term_gradients": term_gradients,
        }
        first_router = first_deep - (0 if self.router is None else len(self.router.terms))
        results = self.losses(outputs, scales=scales[:first_router], plan=plan, limit=limit, measure=measure, **options)
        if self.router is not None:
            own = scales[first_router:first_deep]
            results = self._with_routers(
                results, outputs, batch=batch, signal=signal, scales=own, load=load, watched=term_gradients
            )
        if not self.deep_layers:
            return results
        found = [
            self._deep_losses(outputs, layer=layer, scales=part, **options)
            for layer, part in zip(deep, scales[first_deep:].split(len(self.vocabulary.terms)), strict=False)
        ]
        sums = [layer["sums"] for layer in found] or [results["sums"].new_zeros(len(scales) - first_deep)]
        results["sums"] = torch.cat([results["sums"], *sums])
        for layer in found:
            results["loss"] = results["loss"] + layer["loss"]
        if term_gradients and found:
            results["deep_squares"] = torch.cat([layer["squares"] for layer in found])
        return results

    def _vocabulary(self, hidden_BSD: Tensor, *, signal: TeacherSignal | None, **options: Any) -> dict[str, Tensor]:
        spec = self.student.head_spec
        results: dict[str, Tensor] = self.vocabulary(
            hidden_BSD,
            self.student.head_weight,
            self.student.head_bias,
            head_scale=spec.scale,
            softcap=spec.softcap,
            vocab_size=spec.vocab_size,
            signal=signal if isinstance(signal, HiddenSignal | TopKSignal | SampledSignal | MixtureSignal) else None,
            **options,
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
        load: Tensor | None,
        watched: bool,
    ) -> dict[str, Tensor]:
        """`results` with what the routers add."""
        assert self.router is not None
        if load is None or not self.training:
            return results | {"sums": torch.cat([results["sums"], results["sums"].new_zeros(len(scales))])}
        squares_N = torch.zeros_like(scales) if watched else None
        sums_N, figures = self.router(
            self.student.taps_of(outputs),
            None if signal is None else signal.taps,
            batch=batch,
            load_LX=load,
            squares_N=squares_N,
        )
        found = {
            "loss": results["loss"] + (sums_N * scales).sum(),
            "sums": torch.cat([results["sums"], sums_N.detach().to(results["sums"].dtype)]),
            "router": figures,
        }
        return results | found | ({} if squares_N is None else {"router_squares": squares_N})

    def _deep_losses(self, outputs: Mapping[str, Tensor], *, layer: int, **options: Any) -> dict[str, Tensor]:
        """The vocabulary terms of an intermediate layer, read through the final norm and the head."""
        norm = self.student.final_norm
        assert norm is not None
        return self._vocabulary(norm(outputs[f"hidden.{layer}"]), **options)

    def losses(
        self,
        outputs: Mapping[str, Tensor],
        *,
        batch: Batch,
        signal: TeacherSignal | None,
        scales: Tensor,
        plan: AlignmentPlan,
        temperature: Tensor | None,
        limit: Tensor | None,
        measure: bool,
        term_gradients: bool,
    ) -> dict[str, Tensor]:
        """What the last layer and the alignment add to what `forward` gives; called inside of it."""
        terms = len(self.vocabulary.terms)
        results = self._vocabulary(
            outputs["last"],
            batch=batch,
            signal=signal,
            scales=scales[:terms],
            temperature=temperature,
            limit=limit,
            measure=measure,
            term_gradients=term_gradients,
        )
        if self.alignment is None:
            return results
        if not plan.pairs:
            zeros = scales.new_zeros(len(scales) - terms)
            return results | {"sums": torch.cat([results["sums"], zeros])}
        assert signal is not None, "alignment needs the teacher's captured activations"
        squares_N = scales.new_zeros(len(scales) - terms) if term_gradients else None
        sums_N = self.alignment(self.student.taps_of(outputs), signal.taps, batch=batch, plan=plan, squares_N=squares_N)
        results = results | {
            "loss": results["loss"] + (sums_N * scales[terms:]).sum(),
            "sums": torch.cat([results["sums"], sums_N.detach().to(results["sums"].dtype)]),
        }
        return results if squares_N is None else results | {"alignment_squares": squares_N}

    def named_trainables(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Parameters under the names that a user knows: the student's as in its Hugging Face checkpoint, those of
        alignment terms as `alignment.terms.<term>.…`."""
        for name, parameter in self.named_parameters():
            yield plain_name(name.removeprefix(_STUDENT_PREFIX)), parameter
