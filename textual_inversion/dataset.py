"""Pictures, masks and captions: checked once, resized and turned into batches of latents."""

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from .config import TrainConfig
from .errors import UserError
from .image_tokens import image_prompts, image_trigger, uses_image_tokens
from .prompts import caption_prompt, check_characters, template_prompts

logger = logging.getLogger(__name__)
SMALLEST_SIDE = 8
FIXED_DRAWS = 16  # rows of a block of fixed batches
MOST_NAMED = 5  # pictures or masks in a message
EDGE = 1 / 8  # of a picture's width and height, on every side
GRID = 8  # pixels per latent of every Stable Diffusion autoencoder


def check_pictures(images: Sequence[Tensor], masks: Sequence[Tensor], captions: Sequence[str]) -> None:
    """Raises UserError for anything that cannot be trained on.

    ``images`` (1, H, W, 3 or 4) in 0..1, ``masks`` (1, H, W) in 0..1 or none at all, ``captions``
    one text for each picture, one for all, or none.
    """
    if not images:
        raise UserError("There are no pictures: connect at least one to 'images'.")
    for number, image in enumerate(images, 1):
        if image.ndim != 4 or image.shape[-1] not in (3, 4):
            raise UserError(f"Picture {number} has shape {tuple(image.shape)}; it must be (1, height, width, 3).")
        height, width = image.shape[1:3]
        if min(height, width) < SMALLEST_SIDE:
            raise UserError(
                f"Picture {number} is {width} x {height} pixels; it must be at least "
                f"{SMALLEST_SIDE} x {SMALLEST_SIDE}: leave it out or scale it up."
            )
        if not torch.isfinite(image).all():
            raise UserError(f"Picture {number} contains NaN or infinite values: check the node that made it.")
    if masks and len(masks) != len(images):
        raise UserError(f"There are {len(masks)} masks for {len(images)} pictures: connect one for each, or none.")
    for number, mask in enumerate(masks, 1):
        if not torch.isfinite(mask).all():
            raise UserError(f"Mask {number} contains NaN or infinite values: check the node that made it.")
    if empty := [number for number, mask in enumerate(masks, 1) if mask.numel() == 0 or mask.max() <= 0]:
        raise UserError(
            f"Nothing is white in {numbered('mask', empty)}, so nothing would be learned there: invert masks that come "
            "from Load Image (Invert Mask), paint white what is to be learned, or connect no masks."
        )
    check_captions(captions)
    if len(captions) not in (0, 1, len(images)):
        raise UserError(
            f"There are {len(captions)} captions for {len(images)} pictures: connect one for each, one for all, "
            "or none."
        )


def check_captions(captions: Sequence[str]) -> None:
    """Raises UserError for what is no text."""
    for number, caption in enumerate(captions, 1):
        if not isinstance(caption, str):
            raise UserError(f"Caption {number} is {caption!r:.40}, which is no text: connect texts to 'captions'.")
        check_characters(f"Caption {number}", caption)


def numbered(what: str, numbers: Sequence[int]) -> str:
    """``mask 2``, ``masks 1 and 3``, ``masks 1, 2, 3, 4, 5 and 7 more``."""
    if len(numbers) == 1:
        return f"{what} {numbers[0]}"
    first, rest = numbers[:-1], str(numbers[-1])
    if len(numbers) > MOST_NAMED:
        first, rest = numbers[:MOST_NAMED], f"{len(numbers) - MOST_NAMED} more"
    return f"{what}s {', '.join(map(str, first))} and {rest}"


def resize(image: Tensor, size: int, square: bool = False) -> Tensor:
    """Resizes a picture to about ``size`` x ``size`` pixels without changing its proportions.

    ``image`` (1, H, W, C). ``square`` crops the middle; otherwise the area becomes size^2. 0 keeps
    the scale. Sides become multiples of 8 by cropping less than 8 pixels, never by squashing.
    """
    height, width = image.shape[1:3]
    if square:
        side = min(height, width)
        image = _crop_middle(image, side, side)
        height = width = side
    if size:
        scale = size / math.sqrt(height * width)
        height, width = (max(GRID, round(side * scale)) for side in (height, width))
        if (height, width) != tuple(image.shape[1:3]):
            channels_first = image.movedim(-1, 1)  # (1, C, H, W)
            resized = F.interpolate(channels_first, (height, width), mode="bicubic", antialias=True)
            image = resized.clamp(0, 1).movedim(1, -1)
    return _crop_middle(image, height // GRID * GRID, width // GRID * GRID)


def size_for(image: Tensor, size: int, native_size: int) -> int:
    """``size``, or where that is 0 the model's own for a picture (1, H, W, C) that is larger; 0 keeps the scale."""
    is_larger = native_size and math.sqrt(image.shape[1] * image.shape[2]) > native_size + GRID
    return size or (native_size if is_larger else 0)


def _crop_middle(image: Tensor, height: int, width: int) -> Tensor:
    top = (image.shape[1] - height) // 2
    left = (image.shape[2] - width) // 2
    return image[:, top : top + height, left : left + width]


@dataclass(frozen=True)
class Dataset:
    """What training draws from. Items of different shapes may be mixed; a batch never mixes them."""

    latents: list[Tensor]  # (C, h, w) each, in the model's latent scale; of a video model (C, 1, h, w)
    mirrored: list[Tensor]  # latents of the mirrored pictures, or empty
    masks: list[Tensor]  # one channel of a latent each, in 0..1, or empty
    prompts: list[tuple[str, ...]]  # the prompts of item i, with the trigger word in place
    image_triggers: list[str]  # trigger of the per-image token in the prompts of item i, or empty
    captions: int = 0  # items whose prompt is a caption
    scaled_down: int = 0  # items that were larger than the model's own size
    native_size: int = 0  # that size, in pixels a side

    def indices_by_shape(self) -> list[list[int]]:
        """Items grouped by latent shape, in order of first appearance."""
        groups: dict[torch.Size, list[int]] = {}
        for index, latent in enumerate(self.latents):
            groups.setdefault(latent.shape, []).append(index)
        return list(groups.values())


@dataclass(frozen=True)
class Batch:
    """One training example per row, with all random values already drawn."""

    latents: Tensor  # (B, C, h, w)
    masks: Tensor | None  # (B, 1, h, w)
    prompts: list[str]  # B
    noise: Tensor  # (B, C, h, w)
    quantiles: Tensor  # (B,) in 0..1: position on the model's noise schedule

    def rows(self, index: slice | Sequence[int] | Tensor) -> "Batch":
        """Some of the rows; ``index`` as for a tensor."""
        chosen = torch.arange(len(self.prompts))[index]
        return Batch(
            self.latents[chosen],
            None if self.masks is None else self.masks[chosen],
            [self.prompts[row] for row in chosen.tolist()],
            self.noise[chosen],
            self.quantiles[chosen],
        )

    @classmethod
    def joined(cls, batches: "Sequence[Batch]") -> "Batch":
        """The rows of several batches of one shape. Where only some have masks, the others count everywhere."""
        if len(batches) == 1:
            return batches[0]
        masks = None
        if channels := [batch.masks.shape[1] for batch in batches if batch.masks is not None]:
            whole = [torch.ones_like(batch.latents[:, : channels[0]]) for batch in batches]
            masks = torch.cat([all_ if b.masks is None else b.masks for all_, b in zip(whole, batches, strict=True)])
        return Batch(
            torch.cat([batch.latents for batch in batches]),
            masks,
            [prompt for batch in batches for prompt in batch.prompts],
            torch.cat([batch.noise for batch in batches]),
            torch.cat([batch.quantiles for batch in batches]),
        )


def make_dataset(
    encode_images,
    images: Sequence[Tensor],
    masks: Sequence[Tensor],
    captions: Sequence[str],
    config: TrainConfig,
    native_size: int = 0,
) -> Dataset:
    """Checks and resizes the pictures and encodes each one once.

    ``encode_images`` maps a list of (1, H, W, 3) to a list of latents (C, h, w). Without masks, transparency is one.
    ``native_size``, if given, is what ``size`` 0 scales larger pictures down to.
    Raises UserError as ``check_pictures`` and ``template_prompts`` do, and for latents that are not numbers.
    """
    masks = masks or _transparency(images)
    check_pictures(images, masks, captions)
    templates = template_prompts(config.kind, config.template, config.trigger)
    if len(captions) == 1:
        captions = list(captions) * len(images)
    prompts, image_triggers = [], []
    for index, caption in enumerate(captions or [""] * len(images)):
        image = image_trigger(index) if uses_image_tokens(config, caption, masks[index] if masks else None) else ""
        image_triggers.append(image)
        if caption.strip():
            prompts.append((caption_prompt(caption, config.trigger, config.kind),))
        else:
            prompts.append(image_prompts(config.kind, config.trigger, image) if image else templates)
    sizes = [size_for(image, config.size, native_size) for image in images]
    scaled_down = 0 if config.size else sum(map(bool, sizes))
    if scaled_down:
        told = "Textual inversion: %d of %d pictures are scaled down to the model's own size, about %d x %d pixels."
        logger.info(told, scaled_down, len(images), native_size, native_size)
    pixels = [resize(image[..., :3], size) for image, size in zip(images, sizes, strict=True)]
    latents = encode_images(pixels)
    mirrored = encode_images([image.flip(2) for image in pixels]) if config.flip_probability else []
    _check_latents(latents)
    _check_latents(mirrored)
    latent_masks = [
        _latent_mask(mask, image, latent, size, number)
        for number, (mask, image, latent, size) in enumerate(zip(masks, images, latents, sizes, strict=False), 1)
    ]
    with_captions = sum(map(bool, map(str.strip, captions)))
    return Dataset(latents, mirrored, latent_masks, prompts, image_triggers, with_captions, scaled_down, native_size)


def _transparency(images: Sequence[Tensor]) -> list[Tensor]:
    """The fourth channels (1, H, W) where one of them is not opaque, as other nodes give pictures; otherwise none."""
    alphas = [image[..., 3] if image.shape[-1] == 4 else torch.ones(image.shape[:-1]) for image in images]
    return alphas if any((alpha < 1).any() for alpha in alphas) else []


def _check_latents(latents: Sequence[Tensor]) -> None:
    if broken := [number for number, latent in enumerate(latents, 1) if not torch.isfinite(latent).all()]:
        raise UserError(
            f"The VAE makes NaN of {numbered('picture', broken)}, since its numbers overflow: use a VAE that works in "
            "fp16, or run it in fp32 (ComfyUI: start with --fp32-vae)."
        )


def _latent_mask(mask: Tensor, image: Tensor, latent: Tensor, size: int, number: int) -> Tensor:
    """The mask (1, H, W) at the resolution of the latent, one channel of it. Resized and cropped as its picture."""
    full = F.interpolate(mask.reshape(1, 1, *mask.shape[-2:]).float(), tuple(image.shape[1:3]), mode="area")
    resized = resize(full.movedim(1, -1), size).movedim(-1, 1)  # (1, 1, H', W')
    small = F.interpolate(resized, tuple(latent.shape[-2:]), mode="area")[0].clamp(0, 1)
    if small.max() <= 0:
        raise UserError(f"Mask {number} is empty after resizing: make its white area larger.")
    return small.reshape(1, *[1] * (latent.ndim - 3), *small.shape[-2:]).clone()


def training_batches(dataset: Dataset, config: TrainConfig, generator: torch.Generator) -> Iterator[Batch]:
    """Endless random batches, each of one shape. Within a shape every picture is drawn equally often."""
    groups = dataset.indices_by_shape()
    orders = [_shuffled(group, generator) for group in groups]
    sizes = torch.tensor([len(group) for group in groups], dtype=torch.float64)
    while True:
        order = orders[int(torch.multinomial(sizes, 1, generator=generator))]
        indices = [next(order) for _ in range(config.batch_size)]
        yield _draw(dataset, indices, torch.rand(len(indices), generator=generator), config, generator)


def fixed_batches(dataset: Dataset, config: TrainConfig, draws_per_picture: int = 0, block: int = 0) -> list[Batch]:
    """The same noise, noise levels and prompts on every call, for measurements that can be compared.

    Noise levels are spread evenly over the schedule, whatever the shapes, so that a few draws say as much as many
    random ones. 0 draws: about 16 in all, and of many pictures only every second, third ..., to stay cheap.
    Another ``block`` has other noise, and of many pictures others.
    """
    generator = torch.Generator().manual_seed(block)
    pictures = len(dataset.latents)
    every = 1 if draws_per_picture else math.ceil(pictures / FIXED_DRAWS)
    draws = draws_per_picture or max(1, FIXED_DRAWS // pictures)
    # By shape, so that every shape has its share of what is left.
    by_shape = [index for group in dataset.indices_by_shape() for index in group]
    indices = [index for index in by_shape[block % every :: every] for _ in range(draws)]
    quantiles = (torch.randperm(len(indices), generator=generator) + 0.5) / len(indices)
    batches = []
    for start, end in _stretches([dataset.latents[index].shape for index in indices], config.batch_size):
        batches.append(_draw(dataset, indices[start:end], quantiles[start:end], config, generator))
    return batches


def _stretches(shapes: Sequence[torch.Size], longest: int) -> Iterator[tuple[int, int]]:
    """Where batches begin and end: each of one shape and at most ``longest``."""
    start = 0
    for end in range(1, len(shapes) + 1):
        if end == len(shapes) or end - start == longest or shapes[end] != shapes[start]:
            yield start, end
            start = end


def _shuffled(items: list[int], generator: torch.Generator) -> Iterator[int]:
    while True:
        for position in torch.randperm(len(items), generator=generator).tolist():
            yield items[position]


def without_concept(batch: Batch, kind: str) -> Batch:
    """The batch with what a concept of this ``kind`` shows least in: the edges of the pictures, or high noise levels.

    A style is everywhere, but where there is more noise than picture, what is shown counts and not how.
    """
    return replace(batch, quantiles=(1 + batch.quantiles) / 2) if kind == "style" else edges(batch)


def edges(batch: Batch) -> Batch:
    """The batch with masks that count only an eighth of each picture's width and height on every side.

    That is where its background is, and seldom the thing. A picture whose own mask counts nothing there stays as it is.
    """
    height, width = batch.latents.shape[-2:]
    top, left = (max(1, round(side * EDGE)) for side in (height, width))
    edge = torch.ones(height, width)
    edge[top : height - top, left : width - left] = 0
    given = torch.ones_like(batch.latents[:, :1]) if batch.masks is None else batch.masks
    masks = given * edge
    empty = masks.flatten(1).sum(1) == 0
    masks[empty] = given[empty]
    return replace(batch, masks=masks)


def _draw(
    dataset: Dataset, indices: list[int], quantiles: Tensor, config: TrainConfig, generator: torch.Generator
) -> Batch:
    rows, prompts = [], []
    for index in indices:
        flip = bool(dataset.mirrored) and torch.rand((), generator=generator) < config.flip_probability
        rows.append((index, flip))
        choices = dataset.prompts[index]
        prompts.append(choices[int(torch.randint(len(choices), (), generator=generator))])
    latents = torch.stack([(dataset.mirrored if flip else dataset.latents)[index] for index, flip in rows])
    masks = None
    if dataset.masks:
        masks = torch.stack([dataset.masks[i].flip(-1) if flip else dataset.masks[i] for i, flip in rows])
    noise = torch.randn(latents.shape, generator=generator)
    return Batch(latents, masks, prompts, noise, quantiles)
