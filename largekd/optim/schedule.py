"""The learning rate as a pure function of progress."""

import math

from largekd.config.train import OptimConfig


def learning_rate(*, step: int, max_steps: int, config: OptimConfig) -> float:
    """The rate of optimizer step `step` (0 is the first) of `max_steps`.

    Linear warm-up: lr * (step + 1) / warmup_steps, so that no step runs at rate 0. Then, with x the share of the
    remaining steps that is done: constant: lr; linear: lr * (1 - (1 - min_lr_frac) * x);
    cosine: lr * (min_lr_frac + (1 - min_lr_frac) * (1 + cos(pi * x)) / 2). The last step runs at min_lr_frac * lr.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    remaining = max(max_steps - 1 - config.warmup_steps, 1)
    x = min((step - config.warmup_steps) / remaining, 1.0)
    shape = 1.0 - x if config.schedule == "linear" else (1.0 + math.cos(math.pi * x)) / 2.0
    return config.lr * (config.min_lr_frac + (1.0 - config.min_lr_frac) * shape)
