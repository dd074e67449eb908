"""An example of a term of one's own: Huber's loss of the log-probabilities, weighted by the teacher's probabilities.

In a recipe:

    plugins: [recipes/plugins/huber.py]
    objective:
      divergences:
        - {name: plugin, term: huber, options: {delta: 0.5}}

A term gets some rows of both models' logits (`TermRows`: after the temperature, over the ids that both models have) and
the entry's options, and returns one value per row, differentiable in the student's logits. It is never given the whole
batch, and the blend's factors and the division by token counts are applied outside.
"""

from torch import Tensor
from torch.nn import functional as F

from largekd.objectives.plugins import TermRows


def huber(rows: TermRows, *, delta: float = 1.0) -> Tensor:
    """Σ p · h(log q − log p), h(x) = x²/2 up to |x| = delta and linear beyond; (rows,)."""
    # The floor stands for ids that a head rules out with a bias of −inf; they are equal on both sides.
    logp_RV, logq_RV = (
        logits_RV.log_softmax(-1).clamp_min(-1.0e4) for logits_RV in (rows.teacher_logits_RV, rows.student_logits_RV)
    )
    return (logp_RV.exp() * F.huber_loss(logq_RV, logp_RV, reduction="none", delta=delta)).sum(-1)


TERMS = {"huber": huber}
