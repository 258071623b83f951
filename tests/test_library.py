"""Many concepts in one run, on ComfyUI's own SD1 and SDXL classes at small width."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from textual_inversion import Step, TrainConfig, UserError, initial_embedding, train
from textual_inversion.adapters.comfyui import ComfyModel
from textual_inversion.concept_folders import load_concepts
from textual_inversion.dataset import Dataset, fixed_batches
from textual_inversion.embedding import Embedding
from textual_inversion.gradients import Share, compute_gradients
from textual_inversion.initializer import unseen
from textual_inversion.library import (
    Concept,
    by_concept,
    check_triggers,
    learn_together,
    linked,
    unknown_words,
)
from textual_inversion.processes import Processes
from textual_inversion.training import learn

CONFIG = TrainConfig(initializer="toy", steps=4, batch_size=2, evaluate_every=4, patience=0)
WORDS = ("<dog>", "<cat>", "<car>")


@pytest.fixture
def sd1(checkpoints, load):
    return load(checkpoints["SmallSD1"])


@dataclass
class Run:
    """One concept as ``learn_together`` wants it."""

    concept: Concept
    dataset: Dataset
    model: ComfyModel
    config: TrainConfig
    saved: dict[str, Any] | None = None
    broken: bool = False

    searching = staticmethod(unseen)

    def begin(self, resume: bool) -> tuple[Embedding, TrainConfig]:
        if self.broken:
            raise UserError("broken")
        return initial_embedding(self.model.vocabularies(), self.concept.trigger, "toy", 1), self.config


def runs_of(model: ComfyModel, concepts: Sequence[Concept], config: TrainConfig = CONFIG) -> list[Run]:
    configs = [replace(config, trigger=concept.trigger) for concept in concepts]
    return [
        Run(concept, concept.dataset(model, one), model, one) for concept, one in zip(concepts, configs, strict=True)
    ]


def learned(model: ComfyModel, runs: Sequence[Run], at_once: int, on_news: Callable = lambda run, step: None):
    """The last step of each run by its trigger word, or its error."""
    last: dict[str, Step | Exception] = {}
    news = learn_together(model, runs, at_once)
    reply = None
    while True:
        try:
            run, step = news.send(reply)
        except StopIteration:
            return last
        last[run.concept.trigger] = step
        reply = on_news(run, step)


def three(pictures) -> list[Concept]:
    """Concepts with one, two and three pictures; one with captions, one with masks and other shapes."""
    images = pictures(6)
    masks = [torch.ones(1, *image.shape[1:3]) for image in images[3:]]
    return [
        Concept("<dog>", images[:1], [], ["a dog on a red background"]),
        Concept("<cat>", images[1:3], [], []),
        Concept("<car>", images[3:], masks, []),
    ]


@pytest.mark.parametrize("at_once", [2, 3])
def test_each_learns_what_it_learns_alone(graph, pictures, at_once):
    """Alone, and in passes shared with others, whatever they have: captions, masks, other numbers of pictures."""
    model, concepts = ComfyModel(*graph), three(pictures)
    runs = runs_of(model, concepts)
    with model.training() as trainable:
        together = learned(model, runs, at_once)
        for run in runs:
            start = initial_embedding(trainable.vocabularies(), run.concept.trigger, "toy", 1)
            *_, alone = train(trainable, start.trainable(), run.dataset, run.config)
            last = together[run.concept.trigger]
            assert isinstance(last, Step)
            assert last.number == CONFIG.steps
            for key, vectors in alone.best.vectors.items():
                assert not torch.equal(vectors, start.vectors[key])
                torch.testing.assert_close(last.best.vectors[key], vectors, rtol=1e-4, atol=1e-6)


def test_passes_are_shared_and_ended_concepts_make_room(sd1, pictures, monkeypatch):
    model = ComfyModel(*sd1)
    runs = runs_of(model, three(pictures))
    runs[0].config = replace(runs[0].config, steps=2)
    passes = []

    def counted(model, *shares, processes):
        passes.append([share.tokens.concept.trigger for share in shares])
        return compute_gradients(model, *shares, processes=processes)

    monkeypatch.setattr("textual_inversion.library.compute_gradients", counted)
    with model.training():
        learned(model, runs, at_once=2)
    assert passes == [["<dog>", "<cat>"]] * 2 + [["<cat>", "<car>"]] * 2 + [["<car>"]] * 2


def test_one_can_be_stopped_and_one_can_fail(sd1, pictures):
    model = ComfyModel(*sd1)
    runs = runs_of(model, three(pictures))
    runs[1].dataset = replace(runs[1].dataset, latents=[torch.full_like(x, torch.nan) for x in runs[1].dataset.latents])

    def stop_dog(run: Run, step: Any) -> bool | None:
        return True if run.concept.trigger == "<dog>" and step.number == 3 else None

    with model.training():
        last = learned(model, runs, 3, stop_dog)
    assert isinstance(last["<dog>"], Step)
    assert last["<dog>"].number == last["<dog>"].progress.evaluated_step == 3
    assert not isinstance(last["<cat>"], Step)
    assert isinstance(last["<car>"], Step)
    assert last["<car>"].number == CONFIG.steps


def test_out_of_memory_halves_the_pass(sd1, pictures, monkeypatch):
    model = ComfyModel(*sd1)
    runs = runs_of(model, three(pictures))

    def small_card(model, *shares, processes):
        if len(shares) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return compute_gradients(model, *shares, processes=processes)

    monkeypatch.setattr("textual_inversion.library.compute_gradients", small_card)
    with model.training():
        last = learned(model, runs, at_once=3)
    assert [step.number for step in last.values() if isinstance(step, Step)] == [CONFIG.steps] * 3


def test_captions_name_several(sd1, pictures):
    """A picture teaches every concept that its caption names; those learn at the same time, each beside the other."""
    images = pictures(4)
    captions = ["a photo of {} next to <cat>", "a {}", "", "{} behind a <DOG>"]
    concepts = by_concept(["<dog>", "<dog>", "<car>", "<cat>"], images, [], captions, "object")
    dog, car, cat = concepts
    assert [len(concept.images) for concept in concepts] == [3, 1, 2]
    assert (dog.beside, car.beside, cat.beside) == (("<cat>",), (), ("<dog>",))
    assert linked(concepts) == [[0, 2], [1]]
    model = ComfyModel(*sd1)
    runs = runs_of(model, concepts)
    steps: dict[str, list[int]] = {word: [] for word in WORDS}
    with model.training():
        last = learned(model, runs, 1, lambda run, step: steps[run.concept.trigger].append(step.number))
    assert steps == {word: list(range(CONFIG.steps + 1)) for word in WORDS}
    for step in last.values():
        assert isinstance(step, Step)
        assert all(vectors.grad is None for other in step.state.tokens.beside for vectors in other.parameters())
    dog_step, cat_step = last["<dog>"], last["<cat>"]
    assert isinstance(dog_step, Step)
    assert isinstance(cat_step, Step)
    (seen,), cats = dog_step.state.tokens.beside, cat_step.state.ema.concept
    assert all(torch.equal(vectors, cats.vectors[key]) for key, vectors in seen.vectors.items())


def test_one_that_cannot_begin_stays_text_beside_the_others(sd1, pictures):
    concepts = by_concept(list(WORDS), pictures(3), [], ["{} beside <cat>", "", ""], "object")
    model = ComfyModel(*sd1)
    runs = runs_of(model, concepts)
    runs[1].broken = True
    with model.training():
        last = learned(model, runs, 1)
    assert [type(step) for step in last.values()] == [Step, UserError, Step]


def test_captions_name_what_was_learned_before(sd1, pictures):
    """Its vectors are used as they are; without them the word would be ordinary text."""
    model = ComfyModel(*sd1)
    dog, cat = by_concept(["<dog>", "<cat>"], pictures(2), [], ["{} next to <cat>", ""], "object")
    assert linked([dog]) == [[0]]
    last: list[Any] = []
    with model.training() as trainable:
        for scale in (1.0, -1.0):
            known = {cat.trigger: initial_embedding(trainable.vocabularies(), cat.trigger, "car", 1).scaled(scale)}
            *_, (_, step) = learn_together(trainable, runs_of(model, [dog]), known=known)
            last.append(step)
    assert last[0].number == CONFIG.steps
    assert last[0].progress.initial_loss != last[1].progress.initial_loss


def test_after_a_round_all_are_at_the_same_step(sd1, pictures):
    model = ComfyModel(*sd1)
    runs, seen, rounds = runs_of(model, three(pictures)), {}, []
    with model.training() as trainable:
        for run, step in learn_together(
            trainable,
            runs,
            2,
            after_round=lambda learning: rounds.append([seen[one.concept.trigger] for one in learning]),
        ):
            assert isinstance(step, Step)
            seen[run.concept.trigger] = step.number
    assert rounds == [[1, 1], [2, 2], [3, 3], [], [1], [2], [3], []]


class OneIsFull(Processes):
    """Two processes, of which the other one runs out of memory."""

    def sum(self, numbers: torch.Tensor) -> torch.Tensor:
        return torch.cat([numbers[:1], numbers[1:2] + 1, numbers[2:]])


def test_all_processes_hear_that_one_is_out_of_memory(sd1, pictures):
    """All compute a smaller pass then; otherwise they would wait for each other for ever."""
    model = ComfyModel(*sd1)
    (run,) = runs_of(model, three(pictures)[:1])
    with model.training() as trainable:
        embedding, config = run.begin(False)
        learner = learn(trainable, embedding.trainable(), run.dataset, config)
        next(learner)
        share = learner.send(None)
        assert isinstance(share, Share)
        with pytest.raises(MemoryError):
            compute_gradients(trainable, share, processes=OneIsFull(0, 2))


def test_rows_of_a_pass_are_dealt_out_to_all(sd1, pictures):
    """Also those of several concepts with one row each."""
    model = ComfyModel(*sd1)
    dataset = runs_of(model, three(pictures)[:1])[0].dataset
    (batch,) = fixed_batches(dataset, replace(CONFIG, batch_size=3), 3)
    rows = [[Processes(rank, 2).rows_of(batch, before) for rank in range(2)] for before in (0, 1)]
    assert [[len(part.prompts) for part in parts if part] for parts in rows] == [[2, 1], [1, 2]]


def test_resumes(sd1, pictures):
    """Every concept goes on where it was; on a CPU they end as without a break."""
    model = ComfyModel(*sd1)
    images = pictures(3)
    concepts = by_concept(list(WORDS), images, [], ["{} beside <cat>", "", ""], "object")
    states: dict[str, Any] = {}

    def note(run: Run, step: Any) -> None:
        if step.number == 2:
            states[run.concept.trigger] = copy.deepcopy(step.state.to_dict())

    with model.training():
        whole = learned(model, runs_of(model, concepts), 1, note)
    with model.training():
        runs = runs_of(model, concepts)
        for run in runs:
            run.saved = states[run.concept.trigger]
        first: dict[str, int] = {}
        resumed = learned(model, runs, 1, lambda run, step: first.setdefault(run.concept.trigger, step.number) and None)
    assert first == dict.fromkeys(WORDS, 2)
    for word in WORDS:
        for key, vectors in whole[word].best.vectors.items():  # type: ignore[union-attr]
            assert torch.equal(vectors, resumed[word].best.vectors[key])  # type: ignore[union-attr]


def test_words_that_would_be_mixed_up():
    check_triggers(["<cat>", "cat-toy"])
    for words in (["<cat>", "<Cat>"], ["<cat>", "cat"], ["Ä", "ä"]):
        with pytest.raises(UserError, match="same word or the same file"):
            check_triggers(words)
    with pytest.raises(UserError, match="contains"):
        check_triggers(["<cat>", "my cat"])
    assert unknown_words(["<cat>"], ["a <Cat> next to <dog>", "<dog> and 1 < 2 > 1"]) == ["<dog>"]


def test_numbers_must_fit(pictures):
    images = pictures(3)
    with pytest.raises(UserError, match="2 trigger words for 3 pictures"):
        by_concept(["a1", "b1"], images, [], [], "object")
    with pytest.raises(UserError, match="1 masks for 3 pictures"):
        by_concept(["a1", "b1", "b1"], images, [torch.ones(1, 8, 8)], [], "object")


def saved(folder: Path, *names: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        Image.new("RGB", (32, 32), "red").save(folder / name)


def test_folders_are_concepts(tmp_path):
    """What cannot be used is named, and the others go on."""
    saved(tmp_path / "cat", "1.png", "2.png")
    saved(tmp_path / "my dog", "1.png")
    (tmp_path / "my dog/1.txt").write_text("{} next to <cat>")
    (tmp_path / "my dog/notes.md").write_text("no picture")
    saved(tmp_path / "My_Dog", "1.png")
    (tmp_path / "empty").mkdir()
    saved(tmp_path / ("x" * 80), "1.png")
    saved(tmp_path / ".hidden", "1.png")
    (tmp_path / "notes.txt").write_text("a caption of nothing")
    pictures, triggers = load_concepts(tmp_path, 0)
    assert triggers == ["<My_Dog>", "<cat>", "<cat>"]
    assert {name: reason[:30] for name, reason in pictures.left_out} == {
        "empty/": "There are no pictures in the f",
        "my dog/": "its name makes the same word a",
        f"{'x' * 80}/": "The trigger word is 82 bytes l",
    }
    assert pictures.captions == ["", "", ""]


def test_pictures_of_a_folder_are_one_concept(tmp_path):
    saved(tmp_path / "mug", "1.png", "2.png")
    saved(tmp_path / "mug/old", "3.png")
    pictures, triggers = load_concepts(tmp_path / "mug", 0)
    assert triggers == ["<mug>", "<mug>"]
    assert [name for name, _ in pictures.left_out] == ["old/"]
    (tmp_path / "none/inside").mkdir(parents=True)
    with pytest.raises(UserError, match=r"none of the 1 folders inside can be used, the first because There are no"):
        load_concepts(tmp_path / "none", 0)
