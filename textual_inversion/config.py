"""Settings of a run. Node widgets, their limits and tooltips are all read from here."""

import ast
import inspect
import textwrap
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args, get_origin

from .errors import UserError

Kind = Literal["object", "style", "face", "custom"]
Optimizer = Literal["sphere", "adamw"]
Schedule = Literal["cosine", "constant"]


def bounded(default: Any, low: float, high: float, step: float = 1) -> Any:
    """A number field with its limits and the step of its widget."""
    return field(default=default, metadata={"min": low, "max": high, "step": step})


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides the outcome of a training run."""

    trigger: str = "S*"
    """Trigger word: the new word to write in prompts. Pick one that is no ordinary word."""

    initializer: str = ""
    """One or more words to start from, such as "toy" or "red hat". Empty: the word that explains the pictures best."""

    kind: Kind = "object"
    """What the pictures share: an object, a style or a face. Custom uses the template below."""

    template: str = ""
    """Prompts for kind "custom", one a line, with {} where the word goes: "a sketch of {}"."""

    vectors: int = bounded(1, 1, 75)
    """Vectors of the word, each as long as one token of the prompt. More hold more detail and are harder to edit."""

    steps: int = bounded(100, 2, 100_000)
    """Optimizer steps at most: training ends by itself when the loss falls no more."""

    learning_rate: float = bounded(0.3, 1e-6, 1.0, 1e-6)
    """Radians a step turns the vectors by, at most; adamw takes 0.005 here. Halve it when pictures turn to noise."""

    batch_size: int = bounded(4, 1, 64)
    """Pictures per step. Lower it when memory runs out."""

    size: int = bounded(0, 0, 4096, 8)
    """Train at about this many pixels a side, proportions kept. 0: pictures as given."""

    seed: int = bounded(0, 0, 2**63 - 1)
    """Same seed, pictures and settings: the same vectors."""

    gradient_checkpointing: bool = False
    """Saves memory, costs about half as much time again, gives the same result. Off: only when memory is short."""

    optimizer: Optimizer = "sphere"
    """sphere turns the vectors and keeps their length, so that they drown no other word; adamw lets them grow."""

    editability: float = bounded(0.1, 0.0, 1.0, 0.05)
    """0: everything the pictures show. 1: stays near the initializer, which other words change more easily."""

    context_vectors: int = bounded(1, 0, 16)
    """Throw-away vectors for each picture without a caption: for what only it shows, which the word need not learn."""

    averaging: float = bounded(0.8, 0.0, 0.9999, 0.01)
    """Share of the past in the running mean of the vectors, which is what is kept. 0: the last vectors."""

    patience: int = bounded(5, 0, 1000)
    """Training ends when the loss has not fallen by 1% for this many measurements. 0: all steps are done."""

    momentum: float = bounded(0.7, 0.0, 0.999, 0.01)
    """Share of the past in the running gradient. 0: each step follows its own pictures alone."""

    weight_decay: float = bounded(1e-2, 0.0, 1.0, 1e-4)
    """adamw's pull of the vectors towards zero."""

    schedule: Schedule = "cosine"
    """Learning rate over the run: falling along a cosine, or constant."""

    warmup_steps: int = bounded(0, 0, 10_000)
    """Steps over which the learning rate rises from zero."""

    accumulation: int = bounded(1, 1, 64)
    """Batches per optimizer step: a larger batch for the same memory."""

    flip_probability: float = bounded(0.0, 0.0, 1.0, 0.05)
    """How often a picture is mirrored. Leave 0 for faces, text and anything with a left and a right."""

    evaluate_every: int = bounded(10, 1, 10_000)
    """Steps between measurements on fixed noise, which choose the vectors that are kept."""

    def __post_init__(self) -> None:
        check_limits(self)


@dataclass(frozen=True)
class PreviewConfig:
    """Pictures drawn while the word is learned. They never change what is learned."""

    preview_prompt: str = "a photo of {}"
    """Prompt of the preview pictures, with {} or the trigger word where the new word goes."""

    preview_every: int = bounded(50, 0, 100_000)
    """Steps between preview pictures. 0: only one at the end."""

    preview_steps: int = bounded(20, 1, 200)
    """Sampling steps of a preview picture."""

    preview_cfg: float = bounded(7.0, 0.0, 30.0, 0.5)
    """Guidance scale of a preview picture."""

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


def field_help(config: type) -> dict[str, str]:
    """The docstring under every field of ``config``, by field name."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(config))).body
    assert isinstance(tree, ast.ClassDef)
    return {
        node.target.id: inspect.cleandoc(doc.value.value)  # type: ignore[attr-defined]
        for node, doc in zip(tree.body, tree.body[1:], strict=False)
        if isinstance(node, ast.AnnAssign)
    }
