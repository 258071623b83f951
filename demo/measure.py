"""How well a word explains pictures it has not been trained on.

    python -m demo.measure                 learns every concept of demo/concepts and prints a table
    python -m demo.measure --concepts x y  only these

The held-out loss is the mean of ((denoised - x0) / sigma)^2 over 8 pictures and 16 noise levels each,
with the same noise for every text, so that texts can be compared.
"""

import argparse
import json
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from dev.in_process import ROOT, import_comfyui
from textual_inversion import TrainConfig, initial_embedding, train
from textual_inversion.config import Kind
from textual_inversion.dataset import fixed_batches, make_dataset
from textual_inversion.objective import mean_loss
from textual_inversion.pictures import load_folder
from toy_model.words import CHARACTER_NAMES, STYLE_NAMES
from toy_model.world import COLOURS, EARS, HATS, PATTERNS, SCENES, SHAPES

CONCEPTS = ROOT / "demo/concepts"
CHECKPOINT = ROOT / "demo/models/toy.safetensors"
WILD = ROOT / "demo/models/wild.safetensors"  # of 128 pixels
NOISE_LEVELS = 16  # per held-out picture
RESULTS = ROOT / "demo/results.json"


@dataclass(frozen=True)
class Concept:
    """A folder with train/ and heldout/: something the model has never seen."""

    folder: Path
    kind: Kind
    initializer: str
    description: str
    """What a caption would say instead of the word."""

    @classmethod
    def read(cls, name: str) -> "Concept":
        """A name in demo/concepts, or a folder anywhere."""
        folder = Path(name) if Path(name).is_dir() else CONCEPTS / name
        about = json.loads((folder / "concept.json").read_text())
        return cls(folder, about["kind"], about["initializer"], about.get("description", ""))


class Bench:
    """The demo model in this process, and losses of texts and words on a concept's held-out pictures."""

    def __init__(self, checkpoint: Path = CHECKPOINT) -> None:
        self._base = tempfile.TemporaryDirectory(prefix="comfyui-")
        import_comfyui(Path(self._base.name))
        import comfy.sd

        from textual_inversion.adapters.comfyui import ComfyModel

        from . import comfyui_pack  # noqa: F401  lets ComfyUI recognise the checkpoint

        with torch.inference_mode():
            model, clip, vae, *_ = comfy.sd.load_checkpoint_guess_config(str(checkpoint))
        assert model is not None
        assert clip is not None
        assert vae is not None
        self.model = ComfyModel(model, clip, vae)

    def dataset(self, concept: Concept, part: str, config: Any, with_captions: bool = True):
        """``part`` is train or heldout."""

        images, _, captions, _ = load_folder(concept.folder / part, 0, False)
        return make_dataset(self.model.encode_images, images, [], captions if with_captions else [], config)

    def heldout_loss(self, dataset, embedding, text: str, noise_levels: int = NOISE_LEVELS) -> float:
        """Loss of the captions with ``text`` in the place of the word. Call inside ``with model.training():``."""

        prompts = [(choices[0].replace(embedding.trigger, text),) for choices in dataset.prompts]
        batches = fixed_batches(replace(dataset, prompts=prompts), TrainConfig(batch_size=32), noise_levels)
        return mean_loss(self.model, [embedding], batches)

    def best_word(self, dataset, embedding, words: list[str]) -> tuple[float, str]:
        """The word with the lowest loss: all are tried at 2 noise levels, the best 20 at all."""
        rough = sorted(words, key=lambda word: self.heldout_loss(dataset, embedding, word, 2))
        return min((self.heldout_loss(dataset, embedding, word), word) for word in rough[:20])

    def learn(self, concept: Concept, words: list[str], **settings) -> dict[str, Any]:
        """Learns the concept with the node's defaults and measures it."""

        config = TrainConfig(initializer=concept.initializer, kind=concept.kind, **settings)
        training, heldout = (self.dataset(concept, part, config) for part in ("train", "heldout"))
        with self.model.training() as model:
            start = initial_embedding(model.vocabularies(), config.trigger, config.initializer, config.vectors)
            embedding = start.trainable()
            started = time.perf_counter()
            *_, last = train(model, embedding, training, config)
            seconds = time.perf_counter() - started
            loss, word = self.best_word(heldout, start, words)
            return {
                "initializer": self.heldout_loss(heldout, start, concept.initializer),
                "best word": loss,
                "word": word,
                "description": self.heldout_loss(heldout, start, concept.description),
                "learned": self.heldout_loss(heldout, last.best, config.trigger),
                "seconds": round(seconds, 1),
            }


def world_words() -> list[str]:
    """Every single word the demo model has been trained on that could stand for a thing or a style."""

    return sorted({*CHARACTER_NAMES, *STYLE_NAMES, *COLOURS, *EARS, *HATS, *PATTERNS, *SCENES, *SHAPES} - {"none"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = sorted(path.name for path in CONCEPTS.iterdir() if (path / "concept.json").is_file())
    parser.add_argument("--concepts", nargs="+", choices=names, default=names)
    bench, rows = Bench(), {}
    print("| concept | initializer | best of all words | true description | learned | seconds |")
    print("|---|---|---|---|---|---|")
    for name in parser.parse_args().concepts:
        row = rows[name] = bench.learn(Concept.read(name), world_words())
        cells = f"{row['initializer']:.4f} | {row['best word']:.4f} ({row['word']}) | {row['description']:.4f}"
        print(f"| {name} | {cells} | **{row['learned']:.4f}** | {row['seconds']} |", flush=True)
    RESULTS.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
