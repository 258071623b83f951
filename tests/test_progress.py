"""How a run tells whether it learns: agreement of gradients, paired evaluations, what is kept, and when it ends."""

import math
from dataclasses import replace
from itertools import islice, pairwise

import pytest
import torch
from scipy.stats import sem

from demo.measure import Bench, Concept
from textual_inversion import TrainConfig, initial_embedding, train, training
from textual_inversion.adapters.comfyui import ComfyModel
from textual_inversion.agreement import Agreement, in_words
from textual_inversion.dataset import Batch, Dataset, edges, fixed_batches, make_dataset
from textual_inversion.evaluation import CERTAIN, Difference, Evaluation, fairest, flat, gain, handing_over, well_known
from textual_inversion.gradients import Share, compute_gradients
from textual_inversion.image_tokens import TrainedTokens, new_image_tokens
from textual_inversion.initializer import ROUNDS, start_at_words, with_initializer
from textual_inversion.objective import fixed_losses
from textual_inversion.optimizers import learning_rate
from textual_inversion.report import (
    how_it_ended,
    more_steps,
    pictures_used,
    report,
    unusual_rate,
    what_was_learned,
)
from textual_inversion.state import fingerprint
from textual_inversion.training import Choice, learning_rate_factor, still_improving

ROWS = 16


@pytest.mark.parametrize("share", [0.5, 0.2, 0.05])
def test_agreement_is_the_cosine_of_independent_gradients(share):
    """Gradients of a known mean in known noise, a few a hundred times as long: ``share`` is their mean cosine."""
    generator, width, estimates = torch.Generator().manual_seed(0), 960, []
    for _ in range(20):
        agreement = Agreement()
        for number in range(50):
            noise = torch.randn(1, width, generator=generator) * ((1 - share) / width) ** 0.5
            agreement.add([(noise + torch.eye(width)[:1] * share**0.5) * (100 if number % 10 == 0 else 1)])
        estimates.append(agreement.value)
    assert sum(estimates) / len(estimates) == pytest.approx(share, abs=0.012)


def test_gradients_that_chance_decides_do_not_agree():
    agreement, generator = Agreement(), torch.Generator().manual_seed(0)
    for _ in range(50):
        agreement.add([torch.randn(1, 960, generator=generator)])
    assert agreement.value < 0.005


def test_agreement_follows_gradients_that_turn():
    agreement, generator = Agreement(), torch.Generator().manual_seed(0)
    for _ in range(50):
        agreement.add([torch.eye(48)[:1]])
    assert agreement.value == pytest.approx(1, abs=1e-4)
    for _ in range(200):
        agreement.add([torch.randn(1, 48, generator=generator)])
    assert in_words(agreement.value) == "very noisy"


def test_nothing_is_known_of_one_gradient():
    agreement = Agreement()
    agreement.add([torch.ones(1, 4)])
    assert agreement.value == 1


def evaluation(step: int, learned: float, initial: float = 1.0, noise: float = 0.0, rows: int = ROWS) -> Evaluation:
    """Losses around these means: rows differ by far more than the vectors do, and noise is the evaluation's own."""
    of_rows = torch.linspace(0.1, 10, rows)
    own = noise * (-1.0) ** (torch.arange(rows) + step // 10)
    return Evaluation(step, of_rows + initial, of_rows + learned + own)


def test_paired_differences_see_what_the_losses_hide():
    before, after = evaluation(0, 1.0), evaluation(10, 0.97, noise=0.01)
    paired = Difference.of(before.learned, after.learned)
    assert paired.error == pytest.approx(sem((before.learned - after.learned).numpy()))
    assert paired.certain
    assert before.learned.std() / ROWS**0.5 > 10 * paired.mean, "unpaired, it would be chance"
    assert not Difference.of(after.learned, before.learned).certain
    assert not Difference.of(before.learned, evaluation(20, 1.0, noise=0.5).learned).certain


def test_evaluations_with_more_rows_are_compared_on_the_same():
    few, many = evaluation(0, 1.0, rows=16), evaluation(10, 0.5, rows=16)
    longer = Evaluation(
        10, torch.cat([many.initial, torch.full((16,), 99.0)]), torch.cat([many.learned, torch.ones(16)])
    )
    assert Difference.of(few.learned, longer.learned) == Difference.of(few.learned, many.learned)
    assert fairest([few, longer], longer) is longer, "on the rows of both the initializer is as good"


def test_a_gain_is_judged_beside_the_same_tokens():
    """The luck of other evaluations, with other tokens or few rows, must not make what was learned look like chance."""

    def lucky(step: int, rows: int, initial: float, noise: float = 0.0) -> Evaluation:
        made = evaluation(step, initial - 0.05, initial, rows=128)
        luck = noise * (-1.0) ** torch.arange(128)
        return Evaluation(step, (made.initial + luck)[:rows], (made.learned + luck)[:rows])

    few, others = lucky(20, 16, 0.99, noise=0.4), lucky(100, 128, 0.99, noise=-0.4)
    late = lucky(200, 128, 1.0)
    for other in (few, others):
        assert not Difference.of(other.initial, late.learned).certain, "beside it, it looks like chance"
    assert gain([lucky(0, 16, 1.0), few, others, late], late).certain


def test_a_row_that_overflows_in_half_precision_decides_nothing():
    start, half, last = evaluation(0, 1.0), evaluation(50, 0.7), evaluation(100, 0.5)
    clean = gain([start, half, last], last)
    for number, loss in ((3, math.nan), (5, math.inf)):
        last.initial[number] = last.learned[number] = half.learned[number] = loss
    spoiled = gain([start, half, last], last)
    assert spoiled.certain
    assert spoiled.mean == pytest.approx(clean.mean, rel=0.01)
    assert math.isfinite(last.loss)
    assert not flat([start, half, last], 0)


def test_embedding_that_took_in_the_background_does_not_look_good():
    """The per-image tokens hand the background over: beside them the initializer gets worse, and nothing is gained."""
    honest, fooled = evaluation(20, 0.50, initial=0.52), evaluation(60, 0.48, initial=2.0)
    found = gain([evaluation(0, 3.0, initial=3.0), honest, fooled], fooled)
    assert found.mean == pytest.approx(0.04, abs=1e-4)


def test_progress_is_a_lower_loss_and_a_better_word():
    steps = range(0, 100, 10)
    improving = [evaluation(step, 1 - step / 200) for step in steps]
    assert not flat(improving, 0)
    assert flat([evaluation(step, 1 - min(step, 40) / 200) for step in steps], 0)
    tokens_learn = [evaluation(step, 0.8 - step / 200, 1 - step / 200) for step in steps]
    assert flat(tokens_learn, 0)
    assert not handing_over(improving, 0)
    assert handing_over([evaluation(step, 1 - step / 200, 1 + step / 200) for step in steps], 0)
    begun = [evaluation(0, 2.0, 2.0), evaluation(100, 1.0, 1.0), evaluation(120, 0.8, 1.0), evaluation(130, 0.55, 1.0)]
    assert not flat(begun, 100), "the embedding began at step 100, beside tokens that had brought the loss to 1"


def test_progress_is_known_where_its_noise_is_small_beside_what_the_word_is_worth():
    for noise, known in ((0.05, True), (0.1 * ROWS**0.5, False)):
        found = [evaluation(0, 1.0), evaluation(50, 0.5, noise=noise), evaluation(100, 0.5, noise=noise)]
        assert gain(found, found[-1]).certain
        assert flat(found, 0)
        assert well_known(found, 0) == known


def test_the_rate_needs_no_number_of_steps_and_follows_the_agreement():
    def factors(steps, agreement=1.0, began=0, **settings):
        config = TrainConfig(steps=steps, **settings)
        return [learning_rate_factor(done, began, agreement, config) for done in range(began, began + 50)]

    assert factors(60) == factors(3000) == factors(3000, began=20)
    assert factors(60)[30] == pytest.approx(0.5**0.5)  # 1 / sqrt(1 + 30 / 30)
    assert factors(60, 1 / 16)[0] == pytest.approx(0.5)
    assert factors(50, schedule="cosine")[25] == pytest.approx(0.5)
    for schedule in ("automatic", "cosine", "constant"):
        plain, warmed = factors(400, schedule=schedule), factors(400, schedule=schedule, warmup_steps=10)
        assert warmed[:2] == pytest.approx([0.1 * plain[0], 0.2 * plain[1]], rel=1e-3)
        assert warmed[20:] == pytest.approx(plain[20:], rel=0.03)


# Whole runs --------------------------------------------------------------------------------------


@pytest.fixture
def trainable(load, checkpoints, pictures):
    """A model, and ``start(config, captions)``: dataset, embedding and the steps, inside training."""
    model = ComfyModel(*load(checkpoints["SmallSD1"]))

    def start(config, captions=()):
        dataset = make_dataset(model.encode_images, pictures(2), [], captions, config)
        embedding = initial_embedding(trained.vocabularies(), "S*", "toy", 1)
        return dataset, embedding, train(trained, embedding.trainable(), dataset, config)

    with model.training() as trained:
        yield trained, start


def test_run_without_progress_ends_by_itself_and_says_so(trainable, monkeypatch):
    monkeypatch.setattr(training, "STEPS_TO_TELL", 3)  # sooner
    monkeypatch.setattr(training, "MOST_STEPS_TO_TELL", 100)
    model, start = trainable
    config = TrainConfig(learning_rate=1e-6, steps=500, evaluate_every=2, batch_size=1)
    dataset, embedding, steps = start(config, ["a photo of {}"])
    *_, last = steps
    assert last.number < 500
    assert not last.progress.gain.mean > 0.01 * last.progress.initial_loss
    text = report(model, dataset, config, embedding, last, "'toy'")
    assert "Ended by itself" in text
    assert "more would hardly help" in text
    assert "The learning rate 1e-06 is very small (usual: 0.35)" in text
    assert "Try next: learning_rate 0 (Settings)" in text
    assert len(text.splitlines()) <= 8


def test_vectors_that_are_surely_worse_than_the_initializer_are_not_kept():
    """Of the demo model, which knows its words."""
    bench, concept = Bench(), Concept.read("heart")
    config = TrainConfig(initializer=concept.initializer, steps=8, evaluate_every=2, patience=0)
    dataset = bench.dataset(concept, "train", config)
    with bench.model.training() as model:
        embedding = initial_embedding(model.vocabularies(), "S*", concept.initializer, 1)
        for step in train(model, embedding.trainable(), dataset, config):
            if step.number == 4:  # the opposite, in place of everything learned so far
                for vectors in step.state.ema.concept.vectors.values():
                    vectors.neg_()
    first, *_, last = step.progress.evaluations
    assert Difference.of(last.learned, first.learned).certain, "the test must make it worse"
    assert step.best_step == 4
    assert step.progress.flat > 0


@pytest.mark.parametrize(("kind", "batch", "shared"), [("object", 1, 1.0), ("style", 2, 0.0)])
def test_per_image_tokens_have_a_head_start(trainable, kind, batch, shared):
    """The embedding stands still for a quarter of few steps, and everything in the first twentieth.

    The tokens share updates by the part of the pictures that a batch does not show. The rate of a style rises.
    """
    _, start = trainable
    config = TrainConfig(kind=kind, steps=60, evaluate_every=5, batch_size=batch, patience=0)
    _, embedding, steps = start(config)
    now, per_image, first = [], [], embedding.snapshot().vectors
    for step in steps:
        now.append(step.state.tokens.concept.snapshot().vectors)
        per_image.append(
            torch.cat([vectors for image in step.state.tokens.snapshot().per_image for vectors in image.parameters()])
        )
        if step.number:
            assert step.state.optimizer.param_groups[-1]["shared_update_weight"] == shared
        if step.number <= 15:
            assert str(step.learning_rate) == "0.0", "as the panel shows it: not -0"
        else:
            agreement = step.state.optimizer.param_groups[0]["agreement"]
            risen = min(1, (step.number - 15) / 10) if kind == "style" else 1
            factor = risen * learning_rate_factor(step.number - 1, 15, agreement, config)
            assert step.learning_rate == pytest.approx(learning_rate(config) * factor)
        if step.number == 15:
            assert all(torch.equal(step.state.ema.concept.vectors[key], first[key]) for key in first)
            assert (step.progress.evaluated_step, step.best_step) == (15, 15)
            assert step.state.agreement.steps == 10, "gradients of edges say nothing of those of pictures"
            assert all(same(*images) for images in zip(step.state.ema.per_image, images_of(step), strict=True))
    at_start = [all(torch.equal(vectors[key], first[key]) for key in first) for vectors in now]
    assert [number for number, is_first in enumerate(at_start) if is_first] == list(range(16))
    moved = [not torch.equal(before, after) for before, after in pairwise(per_image)]
    # In a run of 160 steps or more they would be put at words in the first step.
    assert [step for step, has in enumerate(moved, 1) if has] == list(range(4, 61))
    assert len(step.state.tokens.per_image) == 2
    assert [evaluation.step for evaluation in step.progress.evaluations][:2] == [0, 15], "nothing to see in between"


@pytest.mark.parametrize("kind", ["object", "face", "style"])
def test_in_the_head_start_tokens_learn_from_what_shows_the_concept_least(trainable, monkeypatch, kind):
    """From the edges of pictures, or for a style, which is everywhere, from high noise levels. Words likewise."""
    batches, plain = [], training.compute_gradients

    def watched(model, share, **options):
        batches.append((share.number, share.batches))
        return plain(model, share, **options)

    monkeypatch.setattr(training, "compute_gradients", watched)
    _, start = trainable
    list(islice(start(TrainConfig(kind=kind, steps=160, patience=0))[2], 50))
    assert [number for number, _ in batches] == [0] * ROUNDS + list(range(1, 50))
    for number, some in batches:
        without = number == 0 or 8 < number <= 40
        for batch in some:
            assert (batch.masks is not None) == (without and kind != "style")
        quantiles = torch.cat([batch.quantiles for batch in some])
        assert bool((quantiles >= 0.5).all()) == (without and kind == "style") or len(quantiles) < 8


def test_edges_of_pictures_with_masks():
    """A mask that counts nothing at the edge stays: a picture with it has no per-image token."""
    masks = torch.zeros(2, 1, 16, 24)
    masks[0, 0, :, :12] = 0.5
    masks[1, 0, 5:9, 5:9] = 1.0
    left, middle = masks_of(edges(Batch(torch.zeros(2, 4, 16, 24), masks, ["a"] * 2, torch.zeros(0), torch.zeros(2))))
    expected = torch.zeros(16, 24)
    expected[:2, :12] = expected[-2:, :12] = expected[:, :3] = 0.5
    assert torch.equal(left[0], expected)
    assert torch.equal(middle, masks[1])
    video = masks_of(edges(Batch(torch.zeros(1, 4, 1, 8, 8), None, ["a"], torch.zeros(0), torch.zeros(1))))
    assert video.shape == (1, 1, 1, 8, 8)
    assert video.sum() == 28


def masks_of(batch: Batch) -> torch.Tensor:
    assert batch.masks is not None
    return batch.masks


@pytest.mark.parametrize("finite", [True, False])
def test_tokens_start_at_words_as_far_as_there_are_gradients(trainable, monkeypatch, finite):
    """One without rows, or whose gradients are no numbers, stays where it is; nothing else moves."""
    model, start = trainable
    config = TrainConfig(per_image_tokens=2)
    dataset, embedding, _ = start(config)
    concept = embedding.trainable()
    images = new_image_tokens(model.vocabularies(), dataset.image_triggers, concept, 2)
    before = [image.snapshot() for image in (concept, *images)]
    rows = []
    for batch in fixed_batches(dataset, config):
        first = [number for number, prompt in enumerate(batch.prompts) if images[0].trigger in prompt]
        rows += [edges(batch.rows(first))] if first else []
    monkeypatch.setattr(Share, "finite", finite)
    shares, told = 0, []
    for share in start_at_words(model, TrainedTokens(concept, images), rows, lambda *progress: told.append(progress)):
        compute_gradients(model, share)
        shares += 1
    done, totals = zip(*told, strict=True)
    assert list(done) == sorted(set(done)), "it only goes forward"
    assert (done[0], {done[-1]}) == (0, set(totals))
    stayed = [same(embedding, old) for embedding, old in zip((concept, *images), before, strict=True)]
    assert stayed == [True, not finite, True]
    assert shares == (ROUNDS if finite else 1)
    assert all(vectors.grad is None for vectors in TrainedTokens(concept, images).parameters())
    if finite:
        for key, vocabulary in model.vocabularies().items():
            ((word, cosine),), again = vocabulary.nearest(images[0].vectors[key].detach(), 1)
            assert cosine == pytest.approx(1, abs=1e-5)
            assert again[0][0] == word
        losses = [fixed_losses(model, [concept, image], rows).mean() for image in (images[0], before[1])]
        assert losses[0] < losses[1]


@pytest.mark.parametrize(
    ("kind", "agreement", "steps", "found"),
    [
        ("object", 1.0, 3000, (120, 120)),
        ("face", 0.16, 3000, (120, 150)),
        ("object", 0.0001, 3000, (120, 424)),
        ("style", 0.25, 3000, (30, 30)),
        ("style", 0.25, 80, (20, 20)),
        ("object", 0.25, 40, (10, 10)),
    ],
)
def test_the_head_start_is_longer_where_gradients_agree_less(trainable, monkeypatch, kind, agreement, steps, found):
    monkeypatch.setattr(Agreement, "value", agreement)
    _, start = trainable
    began = [step.progress.began for step in islice(start(TrainConfig(kind=kind, steps=steps))[2], 13)]
    assert began == [found[0]] * 11 + [found[1]] * 2


def images_of(step) -> tuple:
    return step.state.tokens.per_image


def same(one, other) -> bool:
    return all(torch.equal(vectors, other.vectors[key]) for key, vectors in one.vectors.items())


def test_there_is_no_head_start_where_every_picture_has_a_caption_or_steps_are_few(trainable):
    _, start = trainable
    for config, captions in ((TrainConfig(steps=100), ["a photo of {}"]), (TrainConfig(steps=3), ())):
        assert next(start(config, captions)[2]).progress.began == 0


def test_vectors_that_took_in_what_the_tokens_knew_are_not_kept(trainable, monkeypatch):
    """They lower the loss of the training pictures and so would be the best. And such an evaluation is no progress."""
    _, start = trainable

    def last(handed_over_after: int):
        monkeypatch.setattr(training, "handing_over", lambda found, began: found[-1].step > handed_over_after)
        _, _, steps = start(TrainConfig(steps=60, evaluate_every=5, batch_size=1, patience=0))
        *_, last = steps
        return last.progress

    never, after = last(1000), last(30)
    assert never.step == after.step == 60
    assert never.best_step > 30 >= after.best_step
    assert after.flat > never.flat


def test_stopping_keeps_what_was_learned_since_the_last_evaluation(trainable):
    _, start = trainable
    _, _, steps = start(TrainConfig(steps=100, evaluate_every=50, batch_size=1), ["a photo of {}"])
    for step in steps:
        if step.number == 7:
            last = steps.send(True)
            break
    assert (last.number, last.progress.evaluated_step, last.best_step) == (7, 7, 7)
    assert last.fixed_loss == last.best_loss
    assert next(steps, None) is None


@pytest.mark.parametrize("chosen", [0, 2, 5, 7])
def test_vectors_chosen_by_hand_are_kept_whatever_their_loss_is(trainable, chosen):
    """Before, at and after an evaluation; the loss that is told is theirs."""
    model, start = trainable
    config = TrainConfig(steps=100, evaluate_every=5, batch_size=1, patience=0)
    dataset, _, steps = start(config, ["a photo of {}"])
    for step in steps:
        before = step.progress.initial_loss
        if step.number == chosen:
            choice = Choice(chosen, step.state.tokens.concept.snapshot())
        if step.number == 7:
            last = steps.send(choice)
            break
    assert (last.number, last.best_step) == (7, chosen)
    assert last.progress.initial_loss == before, "by which a resumed run knows the model"
    assert all(torch.equal(last.best.vectors[key], vectors) for key, vectors in choice.vectors.vectors.items())
    rows = [fixed_losses(model, [choice.vectors], fixed_batches(dataset, config, block=0))]
    assert last.fixed_loss == last.best_loss == pytest.approx(torch.cat(rows).mean().item())
    assert next(steps, None) is None


def test_report_tells_chance_from_learning_and_how_it_ended(trainable):
    _, start = trainable
    config = TrainConfig(steps=4, evaluate_every=2, batch_size=1)
    *_, last = start(config, ["a photo of {}"])[2]
    progress = last.progress
    assert ("Nothing was measurably learned" in what_was_learned(progress, "'toy'")) == (not progress.gain.certain)
    assert progress.gain.certain == (progress.gain.mean > CERTAIN * progress.gain.error)
    for without_progress in (0, 2):
        ended = replace(progress, flat=without_progress)
        assert "Ended at the upper bound" in how_it_ended(ended, config), "also where it would have ended by itself"
        assert still_improving(ended, config) == (without_progress == 0)
        assert "run again" not in how_it_ended(ended, config), "only the node keeps what such a run needs to go on"
    assert "raise steps and run again" in how_it_ended(progress, config, waits=True)
    assert "before the word began" in how_it_ended(replace(progress, began=9), config, waits=True)
    assert not still_improving(progress, TrainConfig(steps=4, patience=0)), "such a run cannot go on"
    assert not still_improving(replace(progress, flat=0), TrainConfig(steps=4, schedule="cosine"))


@pytest.mark.parametrize(("captions", "number"), [((), 8), (["a photo of {}"], 3)])
def test_report_of_a_run_that_was_stopped_early(trainable, captions, number):
    """Where everything stands still at first, nothing is said of the model or the pictures."""
    model, start = trainable
    config = TrainConfig(steps=100, batch_size=1)
    dataset, embedding, steps = start(config, captions)
    last = next(steps.send(True) for step in steps if step.number == number)
    assert last.best_step == number
    text = report(model, dataset, config, embedding, last, "'toy'")
    assert "has no influence" not in text
    assert "Nothing was measurably learned" in text
    assert "Try next: more steps" in text


def test_an_unfinished_run_with_fewer_steps_keeps_what_it_learned(trainable):
    _, start = trainable
    config = TrainConfig(steps=100, evaluate_every=50, batch_size=1)
    saved = next(step for step in start(config, ["a photo of {}"])[2] if step.number == 20).state.to_dict()
    dataset, embedding, _ = start(config, ["a photo of {}"])
    (last,) = train(trainable[0], embedding.trainable(), dataset, replace(config, steps=10), saved)
    assert (last.number, last.progress.evaluated_step, last.best_step) == (20, 20, 20)


@pytest.mark.parametrize("patience", [0, 2])
@pytest.mark.parametrize(
    ("began", "step", "flat", "told"),
    [
        (99, 9, 0, "ended before the word began to learn"),
        (5, 9, 1, "too early to tell"),
        (5, 99, 0, "more steps would help"),
        (5, 9999, 2, "more would hardly help"),
    ],
)
def test_report_tells_whether_more_steps_would_help(trainable, began, step, flat, told, patience):
    _, start = trainable
    config = TrainConfig(patience=patience)
    first = next(start(config, ["{}"])[2]).progress
    progress = replace(first, began=began, step=step, flat=flat, agreement=0.5)
    assert told in more_steps(progress, config)


@pytest.mark.parametrize(
    ("pictures", "captions", "masks", "told"),
    [
        (5, 0, 0, "5 pictures (none with captions)"),
        (5, 3, 0, "5 pictures (3 with captions)"),
        (5, 5, 5, "5 pictures (all with captions, all with masks)"),
        (1, 1, 0, "1 picture (all with captions)"),
    ],
)
def test_report_tells_pictures_and_captions(pictures, captions, masks, told):
    latents, texts = [torch.zeros(4, 2, 2)] * pictures, ["on grass"] * captions + ["  "] * (pictures - captions)
    white = [torch.ones(1, 16, 16)] * masks
    images = [torch.rand(1, 16, 16, 3)] * pictures
    dataset = make_dataset(lambda _: latents, images, white, texts if captions else [], TrainConfig())
    assert pictures_used(dataset) == told


@pytest.mark.parametrize("optimizer", ["sphere", "adamw"])
@pytest.mark.parametrize(
    ("times", "told"), [(0.0, ""), (1.0, ""), (0.5, ""), (2.0, ""), (0.02, "very small"), (2.8, "very large")]
)
def test_report_tells_the_part_of_a_learning_rate_far_from_the_usual(optimizer, times, told):
    rate = times * learning_rate(TrainConfig(optimizer=optimizer))
    text = unusual_rate(TrainConfig(optimizer=optimizer, learning_rate=rate))
    assert told in text
    assert bool(text) == bool(told)


# Fixed noise ---------------------------------------------------------------------------------------


def of_shapes(*sides: int) -> Dataset:
    """One picture of each side, in this order; the number of a picture is in its latents."""
    latents = [torch.full((1, side, side), float(number)) for number, side in enumerate(sides)]
    return Dataset(latents, [], [], [("a",)] * len(sides), [""] * len(sides))


MIXES = {
    "one": [2],
    "alike": [2] * 5,
    "nine shapes": range(1, 10),
    "sixteen shapes": range(1, 17),
    "seventeen, two shapes": [2] * 16 + [3],
    "in turn": [2, 3, 4] * 9,
    "forty alike": [2] * 40,
    "two hundred shapes": range(1, 201),
    "a rare one": [2] * 30 + [5] + [3] * 30,
}


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_fixed_noise_covers_the_schedule_whatever_the_shapes(mix, batch_size):
    dataset, seen = of_shapes(*MIXES[mix]), set()
    pictures = len(dataset.latents)
    blocks = math.ceil(pictures / 16)
    for block in range(blocks):
        batches = fixed_batches(dataset, TrainConfig(batch_size=batch_size), block=block)
        quantiles = torch.cat([batch.quantiles for batch in batches])
        rows = len(quantiles)
        assert 8 <= rows <= 16
        assert torch.allclose(quantiles.sort().values, (torch.arange(rows) + 0.5) / rows)
        assert all(1 <= len(batch.prompts) <= batch_size for batch in batches)
        seen |= {int(number) for batch in batches for number in batch.latents[:, 0, 0, 0]}
    assert seen == set(range(pictures)), "in their turns all pictures are measured"


# The search for an initializer -----------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 20])
def test_search_tells_how_far_it_is_and_stays_small(trainable, pictures, count):
    model, _ = trainable
    config, told = TrainConfig(), []
    encode = ComfyModel.encode_images
    dataset = make_dataset(lambda images: encode(model, images), pictures(count), [], [], config)
    found = with_initializer(model, dataset, config, lambda *progress: told.append(progress))
    assert found.initializer
    done, totals = zip(*told, strict=True)
    assert done[0] == 0
    assert list(done) == sorted(set(done)), "it only goes forward"
    assert set(totals) == {done[-1]}
    assert done[-1] <= 17 * 16 / config.batch_size


def test_search_ends_at_once(trainable, pictures):
    model, _ = trainable
    config, told = TrainConfig(), []
    dataset = make_dataset(lambda images: ComfyModel.encode_images(model, images), pictures(2), [], [], config)

    def cancel(done, total):
        told.append(done)
        if len(told) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        with_initializer(model, dataset, config, cancel)
    assert len(told) == 3


def test_more_steps_resume_the_same_run_where_the_rate_does_not_depend_on_them():
    def of(**settings) -> str:
        return fingerprint(TrainConfig(**settings), [], [])

    assert of(steps=100) == of(steps=200) != of(steps=200, seed=1)
    assert of(steps=100, schedule="cosine") != of(steps=200, schedule="cosine")
