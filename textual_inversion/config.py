"""Settings of a run. Node widgets, their limits and tooltips are all read from here."""

import ast
import inspect
import textwrap
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args, get_origin

from .errors import UserError

Kind = Literal["object", "style", "face", "custom"]
OptimizerName = Literal["sphere", "adamw"]  # optimizers.OPTIMIZERS says what each is
Schedule = Literal["automatic", "cosine", "constant"]


def bounded(default: Any, low: float, high: float, step: float = 1, saved_as: str = "") -> Any:
    """A number field with its limits and the step of its widget.

    ``saved_as``: the old name of a renamed field, which saved workflows and unfinished runs still use.
    """
    return field(default=default, metadata={"min": low, "max": high, "step": step, "saved_as": saved_as})


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides the outcome of a training run."""

    trigger: str = "S*"
    """Trigger word: the new word for your prompts. Choose one that is not an ordinary word."""

    initializer: str = ""
    """One or more words to start from, such as "toy" or "red hat". Empty: search the vocabulary for the best one."""

    kind: Kind = "object"
    """What to learn from the pictures: an object, a style or a face. Custom uses the template below."""

    template: str = ""
    """Prompts for kind "custom", one per line, with {} for the trigger word: "a sketch of {}"."""

    vectors: int = bounded(1, 1, 75)
    """Vectors of the embedding. Each takes one token of the prompt. More hold more detail and are harder to edit."""

    steps: int = bounded(3000, 2, 100_000)
    """Maximum number of optimizer steps. Training ends by itself when there is nothing more to learn."""

    learning_rate: float = bounded(0.0, 0.0, 1.0, 1e-6)
    """Largest rotation per step in radians (adamw: an ordinary learning rate). 0: the optimizer's own, 0.35 for
    sphere and 0.005 for adamw. Halve it when pictures turn to noise."""

    batch_size: int = bounded(4, 1, 64)
    """Pictures per step. Reduce it when memory runs out."""

    size: int = bounded(0, 0, 4096, 8)
    """Resize pictures to about this many pixels per side, keeping their proportions. 0: the model's own size (SD1 512,
    SDXL 1024); smaller pictures stay as they are."""

    seed: int = bounded(0, 0, 2**63 - 1)
    """The same seed, pictures and settings give the same vectors."""

    gradient_checkpointing: bool = False
    """Saves memory, takes about half as much time again, gives the same result. Off: only when memory is short."""

    optimizer: OptimizerName = "sphere"
    """sphere rotates the vectors and keeps their length, so the embedding does not drown other words of the prompt.
    adamw lets them grow."""

    editability: float = bounded(0.1, 0.0, 1.0, 0.05)
    """0: learn everything the pictures show. 1: stay near the initializer, which is easier to change with other
    words. Only for sphere."""

    per_image_tokens: int = bounded(1, 0, 16, saved_as="context_vectors")
    """Extra tokens for each picture without a caption. They learn what only that picture shows, such as its
    background, so the embedding does not. They are not saved. 0: off."""

    averaging: float = bounded(0.9999, 0.0, 0.9999, 0.0001)
    """Largest EMA decay. The decay grows, so that the average covers the last third of the run. The averaged vectors
    are the ones saved. 0: no averaging."""

    patience: int = bounded(2, 0, 1000)
    """Early stopping: stop after this many evaluations in a row without measurable progress. 0: never stop early."""

    momentum: float = bounded(0.7, 0.0, 0.999, 0.01)
    """Momentum of the gradient (adamw: beta1). 0: use only the gradient of the current step."""

    weight_decay: float = bounded(1e-2, 0.0, 1.0, 1e-4)
    """Weight decay. Only for adamw."""

    schedule: Schedule = "automatic"
    """Learning rate schedule. automatic: lower with every step, and the lower the less the gradients agree; it does
    not depend on the number of steps. Or cosine decay to zero at the last step, or constant."""

    warmup_steps: int = bounded(0, 0, 10_000)
    """Steps over which the learning rate rises from zero."""

    accumulation: int = bounded(1, 1, 64)
    """Gradient accumulation: batches per optimizer step. Acts like a larger batch without using more memory."""

    concepts_at_once: int = bounded(0, 0, 64)
    """Of a library: concepts that learn at the same time and share each pass. 0: as many as memory has room for, at
    most 8; one on a CPU."""

    flip_probability: float = bounded(0.0, 0.0, 1.0, 0.05)
    """Probability of mirroring a picture. Leave it at 0 for faces, text and anything with a left and a right."""

    evaluate_every: int = bounded(10, 1, 10_000)
    """Fewest steps between evaluations, which are further apart in a long run. Each measures the loss on the same
    fixed noise."""

    def __post_init__(self) -> None:
        check_limits(self)


@dataclass(frozen=True)
class PreviewConfig:
    """Pictures drawn during training. They never change what is learned."""

    preview_prompt: str = "a photo of {}"
    """Prompts of the preview pictures, one per line. Write {} or the trigger word where the embedding belongs."""

    preview_every: int = bounded(50, 0, 100_000)
    """Steps between preview pictures. 0: only one, at the end."""

    preview_steps: int = bounded(20, 1, 200)
    """Sampling steps of a preview picture."""

    preview_cfg: float = bounded(7.0, 0.0, 30.0, 0.5)
    """Guidance scale (cfg) of a preview picture."""

    preview_negative: str = ""
    """Negative prompt of the preview pictures. For an embedding of what you do not want, write {} only
    here: each picture is drawn without and with it."""

    preview_sampler: str = "euler"
    """Sampler of the preview pictures, as in KSampler."""

    preview_scheduler: str = "normal"
    """Scheduler of the preview pictures, as in KSampler."""

    @property
    def prompts(self) -> list[str]:
        """The lines of ``preview_prompt``."""
        return [line.strip() for line in self.preview_prompt.splitlines() if line.strip()] or [""]

    def __post_init__(self) -> None:
        check_limits(self)


def check_limits(config: TrainConfig | PreviewConfig) -> None:
    """Raises UserError for a value outside its field's limits or choices."""
    for item in fields(config):
        value, limits = getattr(config, item.name), item.metadata
        choices = get_args(item.type) if get_origin(item.type) is Literal else ()
        if limits and not limits["min"] <= value <= limits["max"]:
            raise UserError(f"{item.name} is {value}; choose a value from {limits['min']} to {limits['max']}.")
        if choices and value not in choices:
            raise UserError(f"{item.name} is {value!r}; choose one of {', '.join(choices)}.")


def saved_names(config: type) -> dict[str, str]:
    """The name on disk of every field of ``config``, by its name in the code: in workflows and unfinished runs."""
    return {item.name: item.metadata.get("saved_as") or item.name for item in fields(config)}


def field_help(config: type) -> dict[str, str]:
    """The docstring under every field of ``config``, on one line, by field name."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(config))).body
    assert isinstance(tree, ast.ClassDef)
    return {
        node.target.id: " ".join(doc.value.value.split())  # type: ignore[attr-defined]
        for node, doc in zip(tree.body, tree.body[1:], strict=False)
        if isinstance(node, ast.AnnAssign)
    }
