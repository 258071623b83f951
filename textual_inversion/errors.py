"""Errors whose text is one sentence for the user: what is wrong and what to do."""


class UserError(ValueError):
    """An input that cannot be used."""


class TrainingError(RuntimeError):
    """Training cannot start or cannot work with this model."""


class TrainingStopped(RuntimeError):
    """Training ended early, but the vectors of earlier steps are good."""


def does_not_fit(vectors: int, prompt: str) -> UserError:
    return UserError(
        f"A word of {vectors} vectors does not fit into the prompt {prompt!r}: use fewer vectors or a shorter prompt."
    )
