"""How others learn a word, and how we do: settings of the one training loop, and where it starts from."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from textual_inversion import Embedding, TrainConfig, initial_embedding
from textual_inversion.dataset import Dataset
from textual_inversion.initializer import with_initializer


def from_word(model, dataset, config: TrainConfig) -> Embedding:
    """The token vectors of the initializer (Gal et al. 2022, arXiv 2208.01618)."""
    return initial_embedding(model.vocabularies(), config.trigger, config.initializer, config.vectors)


def from_encoder(model, dataset, config: TrainConfig) -> Embedding:
    """What a CLIP makes of the initializer, as vectors of its input (Pang et al. 2023, arXiv 2312.15905)."""
    word = from_word(model, dataset, config)
    (conditioning,) = model.encode_prompts([word.trigger], word)
    outputs = conditioning["cross_attn"][0, 1 : 1 + word.count]  # after the start token
    return Embedding(word.trigger, {key: outputs.clone() for key in word.vectors})


def from_search(model, dataset, config: TrainConfig) -> Embedding:
    """The word of the whole vocabulary that explains the pictures best, as with an empty initializer."""
    found = with_initializer(model, dataset, replace(config, initializer=""))
    return from_word(model, dataset, found)


@dataclass(frozen=True)
class Recipe:
    """What differs from ours."""

    settings: Mapping[str, Any] = field(default_factory=dict)
    start: Callable[[Any, Dataset, TrainConfig], Embedding] = from_word
    constants: Mapping[str, Any] = field(default_factory=dict)
    """Constants of the engine that differ, by module and name: what is not a setting."""


# What everyone else does: plain AdamW at a constant rate on templates, the last vectors kept, and
# no measurements on the way, which would be on their clock.
PLAIN = {
    "optimizer": "adamw",
    "schedule": "constant",
    "momentum": 0.9,
    "per_image_tokens": 0,
    "averaging": 0.0,
    "patience": 0,
    "evaluate_every": 10_000,
}

RECIPES = {
    "ours": Recipe(),
    # examples/textual_inversion of diffusers, the README's command (5e-4 x batch 1 x accumulation 4)
    "diffusers": Recipe(
        {**PLAIN, "learning_rate": 2e-3, "batch_size": 4, "steps": 3000, "flip_probability": 0.5},
    ),
    # rinongal/textual_inversion, v1-finetune.yaml (5e-3 x batch 2 where one GPU scales it), early enough to stop
    "original": Recipe(
        {**PLAIN, "learning_rate": 5e-3, "batch_size": 2, "steps": 6100, "flip_probability": 0.5},
    ),
    # the Train tab's defaults, of which users run a few thousand steps
    "A1111": Recipe(
        {**PLAIN, "learning_rate": 5e-3, "batch_size": 1, "steps": 3000, "weight_decay": 0.0},
    ),
    # arXiv 2312.15905: 2 vectors, 320 steps of 8
    "cross initialization": Recipe(
        {**PLAIN, "learning_rate": 5e-3, "batch_size": 8, "steps": 320, "vectors": 2},
        from_encoder,
    ),
    # arXiv 2512.13672 (ICLR 2026) and kunheek/dti: steps of .01 rad, 400 of 4; its pull is absolute, here left out
    "directional": Recipe(
        {
            **PLAIN,
            "optimizer": "sphere",
            "learning_rate": 1e-2,
            "momentum": 0.0,
            "editability": 0.0,
            "batch_size": 4,
            "steps": 400,
        },
    ),
}

# Ours with one piece changed: what is kept has to pay (docs/method.md).
ABLATIONS = {
    "no per-image tokens": Recipe({"per_image_tokens": 0}),
    "two per-image tokens": Recipe({"per_image_tokens": 2}),
    "no shared updates": Recipe(constants={"training.SHARED_UPDATE_WEIGHT": 0.0}),
    "no words": Recipe(constants={"initializer.ROUNDS": 0}),
    "no head start": Recipe(constants={"training._head_start": lambda agreement, config: 1}),
    "whole pictures in the head start": Recipe(constants={"training.without_concept": lambda batch, kind: batch}),
    "no rise of the rate": Recipe(constants={"training.RISE_OF_STYLES": 1}),
    "full rate of per-image tokens": Recipe(constants={"training.IMAGE_TOKEN_RATE": 1.0}),
    "decay after 10 steps": Recipe(constants={"training.DECAY_STEPS": 10}),
    "rate without agreement": Recipe({"learning_rate": 0.2}, constants={"training.AGREEMENT_POWER": 0.0}),
    "cosine to step 400": Recipe({"schedule": "cosine", "steps": 400, "learning_rate": 0.3}),
    "no averaging": Recipe({"averaging": 0.0}),
    "average of the whole run": Recipe(constants={"training.AVERAGED_SHARE": 1.0}),
    "adamw": Recipe({"optimizer": "adamw", "learning_rate": 2e-2, "momentum": 0.9}),
    "no anchor": Recipe({"editability": 0.0}),
    "anchor 0.5": Recipe({"editability": 0.5}),
    "searched initializer": Recipe(start=from_search),
}
