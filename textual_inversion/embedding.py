"""What is learned: a trigger and one matrix of vectors per text encoder."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from .errors import UserError, listed

# ComfyUI's names of text encoders, which are the keys of its embedding files. The adapter for ComfyUI finds out
# what the running one has; this is what 0.30.0 has, which a test compares.
ENCODERS = (
    "clip_l",
    "clip_g",
    "clip_h",
    "t5xxl",
    "llama",
    "qwen3_4b",
    "qwen3_8b",
    "mistral3_24b",
    "umt5xxl",
    "pile_t5xl",
    "chinese_roberta",
    "mt5xl",
    "gemma2_2b",
    "gemma3_4b",
    "gemma3_12b",
    "jina_clip_2",
    "ministral3_3b",
    "qwen25_3b",
    "qwen25_7b",
    "qwen3_06b",
    "qwen3_2b",
    "qwen35_2b",
    "qwen3vl_8b",
    "qwen3vl_32b",
    "qwen3vl_4b",
    "qwen35_08b",
    "qwen35_4b",
    "qwen35_9b",
    "qwen35_27b",
    "gemma4",
    "t5base",
    "umt5base",
    "t5gemma",
    "byt5_small",
    "gpt_oss",
    "hidream_o1",
    "lyrics",
    "sam3_clip",
)


@dataclass(frozen=True)
class Embedding:
    """A trigger and its vectors.

    ``vectors`` maps a text encoder's key (ComfyUI's names: ``clip_l``, ``clip_g``, ...) to a float32
    tensor of shape (vectors, width). In training these are the only parameters.

    ``unnamed`` are the keys that name no text encoder: what a file had instead, such as ``*`` or the trigger.
    """

    trigger: str
    vectors: dict[str, Tensor]
    metadata: dict[str, str] = field(default_factory=dict)
    unnamed: frozenset[str] = frozenset()

    @property
    def count(self) -> int:
        """Tokens that the trigger takes in a prompt: the same for every encoder."""
        return max(tensor.shape[0] for tensor in self.vectors.values())

    def parameters(self) -> Iterator[Tensor]:
        yield from self.vectors.values()

    def trainable(self) -> "Embedding":
        """A copy whose vectors are leaf tensors that collect gradients."""
        return self.mapped(lambda tensor: tensor.detach().clone().requires_grad_(True))

    def snapshot(self) -> "Embedding":
        """A copy on the CPU, cut from every graph."""
        return self.mapped(lambda tensor: tensor.detach().to("cpu", torch.float32, copy=True))

    @torch.no_grad()
    def take_over(self, other: "Embedding") -> None:
        """Makes the vectors those of another one of the same shape, in place."""
        for key, vectors in self.vectors.items():
            vectors.copy_(other.vectors[key])

    def for_encoders(self, encoders: dict[str, int], complete: bool = True) -> "Embedding":
        """The vectors by the keys of these encoders, ``{"clip_l": 768}``: found by key, then by width.

        Matching by width applies only to unnamed keys, and only if it is unambiguous.
        Raises UserError, naming both sides, if an encoder would get no vectors; unless ``complete``, if all would.
        """
        found = {}
        for key, width in encoders.items():
            of_this_width = [name for name in self.unnamed if self.vectors[name].shape[-1] == width]
            if key not in self.vectors and len(of_this_width) == list(encoders.values()).count(width) == 1:
                choice = of_this_width[0]
            else:
                choice = key
            if choice in self.vectors and self.vectors[choice].shape[-1] == width:
                found[key] = self.vectors[choice]
        if not found or (complete and len(found) < len(encoders)):
            ours = {name: tensor.shape[-1] for name, tensor in self.vectors.items()}
            raise UserError(
                f"The embedding {self.trigger!r} is made for another model: it has {_list(ours)}, "
                f"the model takes {_list(encoders)}."
            )
        return replace(self, vectors=found, unnamed=frozenset())

    def partly(self, encoders: dict[str, int]) -> str:
        """One line for people where encoders get no vectors, or vectors no encoder; empty where all fit.

        Raises UserError where nothing fits.
        """
        used = self.for_encoders(encoders, complete=False).vectors
        without = [key for key in encoders if key not in used]
        unused = [key or "vectors" for key, rows in self.vectors.items() if all(rows is not r for r in used.values())]
        parts = [f"{listed(without)} of the model reads the word as text" if without else ""]
        parts.append(f"the vectors for {listed(unused)} are not used" if unused else "")
        said = " and ".join(filter(None, parts))
        return f"{self.trigger} works in {listed(used)} only: {said}." if said else ""

    def scaled(self, strength: float) -> "Embedding":
        return self.mapped(lambda tensor: tensor * strength)

    def renamed(self, trigger: str) -> "Embedding":
        return replace(self, trigger=trigger)

    def describe(self) -> str:
        """For people: ``1 vector, clip_l 768 and clip_g 1280``."""
        widths = " and ".join(f"{key[:60]} {t.shape[-1]}" for key, t in self.vectors.items())
        return f"{self.count} vector{'s' if self.count > 1 else ''}, {widths}"

    def mapped(self, change: Callable[[Tensor], Tensor]) -> "Embedding":
        """With ``change`` made to the vectors of each encoder."""
        vectors = {key: change(tensor) for key, tensor in self.vectors.items()}
        return replace(self, vectors=vectors)


def with_guessed_encoders(embedding: Embedding) -> Embedding:
    """Guesses the encoders of unnamed vectors from the widths of Stable Diffusion's CLIPs.

    Raises UserError if two sets of vectors would have the same name.
    """
    usual = {768: "clip_l", 1024: "clip_h", 1280: "clip_g"}
    vectors = {}
    for key, tensor in embedding.vectors.items():
        name = usual.get(tensor.shape[-1], key) if key in embedding.unnamed else key
        if name in vectors:
            raise UserError(f"{embedding.trigger!r} has two sets of vectors for {name}: {listed(embedding.vectors)}.")
        vectors[name] = tensor
    return replace(embedding, vectors=ordered(vectors), unnamed=embedding.unnamed.intersection(vectors))


def ordered(vectors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Restores the order of the text encoders, which safetensors does not keep."""
    rank = {key: position for position, key in enumerate(ENCODERS)}
    return dict(sorted(vectors.items(), key=lambda item: rank.get(item[0], -1)))


def resample(rows: Tensor, count: int) -> Tensor:
    """(tokens, width) to (count, width): averages neighbours, or repeats the rows in turn."""
    if len(rows) >= count:
        return torch.stack([group.mean(0) for group in rows.tensor_split(count)])
    return rows[torch.arange(count) % len(rows)].clone()


def _list(widths: dict[str, int]) -> str:
    return listed(f"{key[:60] or 'vectors'} ({width})" for key, width in widths.items())
