"""Errors whose text is one sentence for the user: what is wrong and what to do."""


class UserError(ValueError):
    """An input that cannot be used."""


class TrainingError(RuntimeError):
    """Training cannot start or cannot work with this model."""


class TrainingStopped(RuntimeError):
    """Training ended early, but the vectors of earlier steps are good."""
