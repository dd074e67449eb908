"""The self-shared teacher seen from the step: its signal arises in the student's engine, its state is kept here."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, tensor

from largekd.config.adapters import SelfSharedTeacherConfig
from largekd.contracts import Batch, SignalRequest, TeacherSignal
from largekd.errors import CheckpointError, TeacherError
from largekd.models.adapters import adapter_sizes
from largekd.models.pruning import PrunedStudent, cubic_sparsity
from largekd.runtime.ranks import Ranks, all_sum

_FILE = "self_shared.safetensors"

# The last step of a span must be its end, whatever the quotient of two floats says.
_ROUNDING = 1e-9


class SelfSharedTeacher:
    """Prunes the student and grows its adapters after each step; the teacher's adapters learn with the student's.

    `total_steps` of the run are what the shares of the schedule refer to, those that were skipped among them.
    `repair` is called with the layers that are left whenever they may have changed.
    """

    def __init__(
        self,
        config: SelfSharedTeacherConfig,
        *,
        student: PrunedStudent,
        total_steps: int,
        ranks: Ranks,
        repair: Callable[[tuple[int, ...]], None],
    ) -> None:
        self._config = config
        self.student = student
        self._total_steps = total_steps
        self._ranks = ranks
        self._repair = repair
        self._steps = 0
        self._reached = False
        self._duplicated_frac = adapter_sizes(student.model).duplicated_frac
        self._note_sizes()

    def check(self, request: SignalRequest) -> None:
        """Errors: TeacherError for less than the whole distribution, and for attention."""
        if request.distribution not in (None, "full") or request.taps.attention:
            raise TeacherError(
                "teacher.kind = 'self_shared': serves its whole distribution and hidden states; set "
                "objective.signal.kind to full and take objective.translation and objective.attention out."
            )

    @contextmanager
    def signals(
        self, micro_batches: Sequence[Batch], *, request: SignalRequest
    ) -> Iterator[Iterator[TeacherSignal | None]]:
        """None for each: the student's forward makes the signal itself."""
        self.student.forget_step()
        yield iter([None] * len(micro_batches))

    def after_step(self, figures: Mapping[str, Tensor]) -> None:
        """Learn saliences and, at an update, move masks and ranks, until the targets are reached. A collective call."""
        self._steps += 1
        if self._reached:
            return
        pruning, student, now = self._config.pruning, self.student, self._done()
        # DeepSpeed averages gradients over ranks, so a rank's own are as many times too large.
        sums = all_sum(student.step_sums) / self._ranks.world_size
        student.learn(sums, decay=pruning.salience_decay)
        if now == 1.0 or (now > 0.0 and self._steps % pruning.every_steps == 0):
            self._update(now)

    def after_skipped_step(self) -> None:
        """Count it. Its saliences are not finite: an update waits for a step that is applied, unless none will come."""
        self._steps += 1
        if self._steps >= self._total_steps and not self._reached:
            self._update(1.0)

    def _update(self, now: float) -> None:
        """Move masks and ranks to where they are when the share `now` of the pruning's span is over."""
        pruning, student = self._config.pruning, self.student
        student.prune(
            neurons=cubic_sparsity(pruning.neurons, done=now),
            head_groups=cubic_sparsity(pruning.head_groups, done=now),
            layers=cubic_sparsity(pruning.layers, done=now),
        )
        if self._config.adapters.largest_rank > self._config.adapters.rank:
            student.grow(by=self._config.adapters.growth)
        self._reached = now == 1.0
        self._follow_masks()

    def _done(self) -> float:
        """The share of the pruning's span that is over."""
        pruning = self._config.pruning
        span = pruning.end_frac - pruning.begin_frac
        share = (self._steps - pruning.begin_frac * self._total_steps) / (span * self._total_steps)
        return 1.0 if share >= 1.0 - _ROUNDING else max(share, 0.0)

    def _follow_masks(self) -> None:
        self._repair(self.student.kept_layers)
        self._note_sizes()

    def _note_sizes(self) -> None:
        student = self.student
        masks, ranks = student.masks, student.ranks
        self._metrics = {
            "prune/neurons_frac": 1.0 - float(masks.neurons.float().mean()),
            "prune/head_groups_frac": 1.0 - float(masks.head_groups.float().mean()),
            "prune/layers_frac": 1.0 - float(masks.layers.float().mean()),
            "prune/mean_rank": float(ranks.float().mean()),
            "prune/duplicated_frac": self._duplicated_frac,
        }

    @property
    def state(self) -> "SelfSharedTeacher":
        """Masks, saliences, ranks, steps, and whether the targets are reached."""
        return self

    def save(self, folder: Path) -> None:
        """Write what is the same on all ranks, once."""
        if self._ranks.is_main:
            tensors = {name: value.cpu().contiguous() for name, value in self.student.state().items()}
            own = {"steps": tensor(self._steps), "reached": tensor(self._reached)}
            save_file(tensors | own, folder / _FILE)

    def load(self, folder: Path) -> None:
        """Become what was saved. Errors: CheckpointError when it cannot be read."""
        try:
            tensors = load_file(folder / _FILE)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{folder / _FILE}: cannot be read ({error})") from error
        self._steps = int(tensors.pop("steps"))
        self._reached = bool(tensors.pop("reached"))
        self.student.restore(tensors)
        self._follow_masks()

    @property
    def metrics(self) -> Mapping[str, float]:
        """What has been pruned, the adapters' mean rank, and the teacher's own parameters over the backbone's."""
        return self._metrics

    def close(self) -> None:
        """Nothing is held that the student's engine does not hold."""
