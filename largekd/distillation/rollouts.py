"""Building what a run's `rollouts` ask for."""

from largekd.config.run import RunConfig
from largekd.data.store import SampleStore
from largekd.distillation.models import Sources
from largekd.errors import ConfigError
from largekd.generation.rollouts import Rollouts, RowShape
from largekd.generation.sampling import DrawRule
from largekd.generation.scoring import REQUEST
from largekd.generation.writer import Writer, stop_tokens
from largekd.models.decoder import Decoder
from largekd.runtime.ranks import Ranks
from largekd.sharding.accelerator import device
from largekd.teachers.protocol import Teacher


def build_rollouts(
    config: RunConfig,
    *,
    samples: SampleStore,
    sources: Sources,
    student: Decoder,
    teacher_decoder: Decoder | None,
    teacher: Teacher,
    ranks: Ranks,
) -> Rollouts | None:
    """The rollouts of a run; None where no row is generated.

    Errors: ConfigError when an answer cannot end; TeacherError when the teacher cannot score sampled tokens.
    """
    chosen, train = config.rollouts, config.train
    if chosen is None or chosen.share == 0:
        return None
    if chosen.policy_gradient is not None:
        teacher.check(REQUEST)
    writer = student
    if chosen.source == "teacher":
        assert teacher_decoder is not None, "checked with the configuration"
        writer = teacher_decoder
    stops = stop_tokens(sources.tokenizer, folder=sources.tokenizer_folder)
    if not stops.ends:
        raise ConfigError(
            f"rollouts: {sources.tokenizer_folder} names no end token in its tokenizer or generation_config.json."
        )
    return Rollouts(
        chosen,
        shape=RowShape(
            global_batch_size=train.global_batch_size,
            micro_batch_size=train.micro_batch_size,
            sequence_length=train.sequence_length,
            packing=config.data.packing,
            chunk_tokens=config.objective.chunk_tokens,
            seed=train.seed,
        ),
        samples=samples,
        writer=Writer(
            writer.model,
            rule=DrawRule(
                ids=sources.shared_vocab_size,
                temperature=chosen.temperature,
                top_p=chosen.top_p,
                top_k=chosen.top_k,
            ),
            stops=stops,
            max_new_tokens=chosen.max_new_tokens,
            batch_size=chosen.batch_size,
            gather=chosen.gather,
            device=device(),
            ranks=ranks,
        ),
        teacher=teacher,
        ranks=ranks,
        device=device(),
    )
