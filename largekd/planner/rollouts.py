"""What a model that writes answers takes on one rank, before the step that uses them.

Letters in the formulas: P parameters, b bytes of the compute dtype, L layers, K key width, V vocabulary, A answers that
are written at the same time, S positions of a prompt with its answer.
"""

from collections.abc import Iterator

from largekd.config.run import RunConfig
from largekd.planner.memory import MemoryTerm, Side

_FLOAT_BYTES = 4


def rollout_terms(config: RunConfig, *, teacher: Side, student: Side) -> Iterator[MemoryTerm]:
    """The writer's copy P·b where its weights are gathered whole, else its largest gathered module; keys and values
    A·S·L·2K·b; a token's logits A·V·(b + 4). `auto` is taken to be whole, which it is where this fits twice.

    An upper estimate: answers that end early keep less.
    """
    chosen = config.rollouts
    if chosen is None or chosen.share == 0:
        return
    side = teacher if chosen.source == "teacher" else student
    b, shape = side.dtype_bytes, side.shape
    if chosen.gather == "streamed":
        largest = max(shape.largest_layer, shape.vocab_size * shape.width)
        yield side.term("writer's gathered module", "accelerator", "rollout", largest * b)
    else:
        name = "writer's whole copy" if chosen.gather == "whole" else "writer's whole copy, if it fits"
        yield side.term(name, "accelerator", "rollout", shape.parameter_count * b)
    positions = min(chosen.prompt_tokens, config.train.sequence_length) + chosen.max_new_tokens
    pairs = 2 * shape.kv_heads * shape.head_dim * len(shape.layers)
    kept = chosen.batch_size * positions * pairs * b
    yield side.term("writer's keys and values", "accelerator", "rollout", kept)
    logits = chosen.batch_size * shape.vocab_size * (b + _FLOAT_BYTES)
    yield side.term("writer's logits of a token", "accelerator", "rollout", logits)
