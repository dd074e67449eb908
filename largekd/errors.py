"""Errors that a user can act on. Each message names the value, the rule and the key or file to change."""


class LargeKDError(Exception):
    """Base of every error that is the user's to mend; a launcher prints its message alone and exits with status 2.

    Rank 0 prints it. `only_here` tells another rank whether to speak too: True when rank 0 does not share the error,
    False when it does, None while that is unknown (before the ranks have met): then one rank of each node speaks.
    """

    only_here: bool | None = None


class ConfigError(LargeKDError):
    """A configuration value, file or combination that cannot be run."""


class DataError(LargeKDError):
    """A data file, record or tokenizer that cannot be used as configured."""


class TeacherError(LargeKDError):
    """A teacher that is absent, does not match the student, or cannot serve the requested signal."""


class CheckpointError(LargeKDError):
    """A checkpoint that is damaged, incomplete, or belongs to a different run."""


class NumericsError(LargeKDError):
    """Losses or gradients that stayed non-finite for too many steps."""


class GenerationError(LargeKDError):
    """Generated text that could not be produced, parsed or verified."""
