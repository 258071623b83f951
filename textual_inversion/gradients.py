"""The gradients of a step: in little memory, with a model in half precision, of several concepts in one pass."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from .adapters.protocol import TrainableModel
from .dataset import Batch
from .devices import is_out_of_memory
from .embedding import Embedding
from .image_tokens import TrainedTokens
from .memory import with_checkpointing_if_out_of_memory
from .objective import row_losses
from .processes import ALONE, Processes
from .prompts import MARK, replace_triggers

MOST_HALVINGS = 16


@dataclass
class Share:
    """What one concept asks for in each of its steps: the gradients of the mean loss of its batches by its vectors.

    The gradient of a mean over many latents underflows in fp16. Scaled by about the number of latents it passes
    through the network as that of a sum. Where that overflows the scale is halved, for good (Micikevicius et al.
    2018, arXiv 1710.03740, section 3.2). Scales are powers of two, so that the gradients do not depend on them.
    """

    tokens: TrainedTokens
    batches: Sequence[Batch] = ()
    number: int = 0
    """Of the step."""
    halvings: int = 0

    @property
    def finite(self) -> bool:
        gradients = [vectors.grad for vectors in self.tokens.parameters() if vectors.grad is not None]
        return all(bool(torch.isfinite(gradient).all()) for gradient in gradients)


def compute_gradients(model: TrainableModel, *shares: Share, processes: Processes = ALONE) -> list[float]:
    """The mean loss of each share; its gradients are in its vectors afterwards.

    What one concept gets does not depend on the others, but for rounding. Where memory runs out, a single share is
    tried once more with gradient checkpointing. A loss or a gradient that is not a number stays so where no scale
    helps.
    """

    def run() -> list[float]:
        return _accumulate(model, shares, processes)

    before = [share.halvings for share in shares]
    while True:
        losses = with_checkpointing_if_out_of_memory(model, run) if len(shares) == 1 else run()
        overflowed = [
            share
            for share, loss in zip(shares, losses, strict=True)
            if math.isfinite(loss) and not share.finite and share.halvings < MOST_HALVINGS
        ]
        if not overflowed:
            break
        for share in overflowed:
            share.halvings += 1
    for share, halvings in zip(shares, before, strict=True):
        if share.halvings > halvings and not share.finite:  # no scale helps, and later gradients would underflow
            share.halvings = halvings
    return losses


def _accumulate(model: TrainableModel, shares: Sequence[Share], processes: Processes) -> list[float]:
    for share in shares:
        for vectors in share.tokens.parameters():
            vectors.grad = None
    losses, full = [0.0] * len(shares), None
    try:
        for parts in _passes(shares, processes):
            for number, loss in _backward(model, parts):
                losses[number] += loss
    except Exception as error:
        if processes.count == 1 or not is_out_of_memory(error):
            raise
        full = str(error)  # the others are told with the sums, since all have to do with less memory then
    *losses, out = processes.add([*losses, float(full is not None)], [share.tokens.parameters() for share in shares])
    if out:
        raise MemoryError(full or "another process is out of memory")
    return losses


@dataclass(frozen=True)
class Part:
    """Rows of one share in one pass through the network."""

    number: int
    """Of the share."""
    share: Share
    batch: Batch
    weight: float
    """Of its mean loss in the loss of the share."""


def _passes(shares: Sequence[Share], processes: Processes) -> Iterator[list[Part]]:
    """Every batch of every share, as far as this process computes it; a pass holds one shape."""
    for turn in range(max(len(share.batches) for share in shares)):
        by_shape: dict[torch.Size, list[Part]] = {}
        before = 0
        for number, share in enumerate(shares):
            batch = share.batches[turn] if turn < len(share.batches) else None
            if batch is None:
                continue
            if (mine := processes.rows_of(batch, before)) is not None:
                weight = len(mine.prompts) / len(batch.prompts) / len(share.batches)
                by_shape.setdefault(mine.latents.shape[1:], []).append(Part(number, share, mine, weight))
            before += len(batch.prompts)
        yield from by_shape.values()


def _backward(model: TrainableModel, parts: Sequence[Part]) -> list[tuple[int, float]]:
    """Adds the gradients of one pass, and returns the share in the loss of each part by the number of its share."""
    embeddings, batch = _joined(parts)
    rows = row_losses(model, embeddings, batch).split([len(part.batch.prompts) for part in parts])
    losses = [losses.mean() * part.weight for losses, part in zip(rows, parts, strict=True)]
    scales = [2.0 ** (round(math.log2(part.batch.latents[0].numel())) - part.share.halvings) for part in parts]
    total = torch.stack([loss * scale for loss, scale in zip(losses, scales, strict=True)]).sum()
    if total.requires_grad:  # or it was cut off completely: training tells the user
        scaled = zip(parts, scales, strict=True)
        parameters = [(vectors, scale) for part, scale in scaled for vectors in part.share.tokens.parameters()]
        gradients = torch.autograd.grad(total, [vectors for vectors, _ in parameters], allow_unused=True)
        for (vectors, scale), gradient in zip(parameters, gradients, strict=True):
            # A per-image token that the batch does not name has no gradient of its own.
            if gradient is not None and gradient.any():
                vectors.grad = gradient / scale + (0 if vectors.grad is None else vectors.grad)
    return list(zip([part.number for part in parts], torch.stack(losses).tolist(), strict=True))


def _joined(parts: Sequence[Part]) -> tuple[list[Embedding], Batch]:
    """All rows of a pass, and the embeddings they name. With several concepts every trigger word gets a name of its
    own, so that a word of one means nothing to the others."""
    if len(parts) == 1:
        return list(parts[0].share.tokens.embeddings), parts[0].batch
    renamed = [_renamed(part, number) for number, part in enumerate(parts)]
    embeddings = [embedding for some, _ in renamed for embedding in some]
    return embeddings, Batch.joined([batch for _, batch in renamed])


def _renamed(part: Part, number: int) -> tuple[list[Embedding], Batch]:
    embeddings = part.share.tokens.embeddings
    triggers = [embedding.trigger for embedding in embeddings]
    names = [f"{MARK}{number}-{place}{MARK}" for place in range(len(triggers))]
    prompts = [replace_triggers(text, triggers, lambda found, _: names[found]) for text in part.batch.prompts]
    renamed = [embedding.renamed(name) for embedding, name in zip(embeddings, names, strict=True)]
    return renamed, replace(part.batch, prompts=prompts)
