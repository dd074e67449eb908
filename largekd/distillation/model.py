"""Everything trainable in one module, so that ZeRO-3's hooks see every use of every weight."""

from collections.abc import Iterator

from torch import Tensor, nn

from largekd.contracts import Batch, TeacherSignal
from largekd.models.decoder import Decoder
from largekd.objectives.vocabulary import VocabularyPass
from largekd.sharding.shards import register_external

_STUDENT_PREFIX = "student.model."


class DistillModel(nn.Module):
    """The student and the losses. Its forward gives a dict with the scalar `loss` and the terms' sums."""

    def __init__(self, *, student: Decoder, vocabulary: VocabularyPass) -> None:
        super().__init__()
        self.student = student
        self.vocabulary = vocabulary
        for parameter in student.head_parameters:
            register_external(vocabulary, parameter)

    def forward(
        self, *, batch: Batch, signal: TeacherSignal | None, scales: Tensor, measure: bool = False
    ) -> dict[str, Tensor]:
        """`scales[k]` multiplies the sum of term k; see VocabularyPass for what is returned."""
        hidden_BSD = self.student(batch=batch)
        spec = self.student.head_spec
        return self.vocabulary(
            hidden_BSD,
            self.student.head_weight,
            self.student.head_bias,
            head_scale=spec.scale,
            softcap=spec.softcap,
            vocab_size=spec.vocab_size,
            batch=batch,
            signal=signal,
            scales=scales,
            measure=measure,
        )

    def named_trainables(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Parameters under the names that a user knows: the student's as in its Hugging Face checkpoint."""
        for name, parameter in self.named_parameters():
            yield name.removeprefix(_STUDENT_PREFIX), parameter
