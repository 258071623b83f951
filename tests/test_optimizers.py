"""How vectors move, what is kept of them, and when it ends."""

from typing import get_args

import pytest
import torch
import torch.nn.functional as F

from textual_inversion import Embedding, TrainConfig, UserError
from textual_inversion.config import OptimizerName
from textual_inversion.image_tokens import TrainedTokens
from textual_inversion.optimizers import OPTIMIZERS, Sphere, check_settings, learning_rate, make_optimizer
from textual_inversion.training import update_ema
from textual_inversion.vocabulary import Vocabulary, word_of

WIDTH = 48


def turned(steps: int, scale: float = 1.0, **settings) -> tuple[torch.Tensor, torch.Tensor]:
    """Vectors (3, WIDTH) before and after steps on random gradients."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(3, WIDTH, generator=generator) * torch.tensor([[0.4], [1.0], [20.0]])
    vectors = start.clone().requires_grad_()
    optimizer = Sphere([vectors], **settings)
    for _ in range(steps):
        vectors.grad = scale * torch.randn(3, WIDTH, generator=generator)
        optimizer.step()
    return start, vectors.detach()


def test_sphere_keeps_lengths():
    start, vectors = turned(200, lr=0.3)
    torch.testing.assert_close(vectors.norm(dim=1), start.norm(dim=1))
    assert (F.cosine_similarity(vectors, start) < 0.9).all()


def test_sphere_refuses_a_vector_of_zeros():
    """As a blend may have them: it has no direction, and became NaN, as if the model had overflowed."""
    tokens = TrainedTokens(Embedding("S*", {"clip_l": torch.eye(2, WIDTH) * torch.tensor([[1.0], [0.0]])}).trainable())
    with pytest.raises(UserError, match="is zero, which sphere cannot rotate: choose optimizer adamw"):
        make_optimizer(tokens, TrainConfig())
    make_optimizer(tokens, TrainConfig(optimizer="adamw"))


def test_sphere_does_not_see_the_scale_of_the_loss():
    plain, scaled = turned(20, lr=0.1)[1], turned(20, 1e-4, lr=0.1)[1]
    torch.testing.assert_close(plain, scaled, rtol=1e-4, atol=1e-5)


def test_sphere_step_is_riemannian_descent():
    """One step of one vector without momentum, against the definition: along the geodesic's tangent, then back."""
    generator = torch.Generator().manual_seed(1)
    start, gradient = torch.randn(2, 1, WIDTH, generator=generator)
    vectors = start.clone().requires_grad_()
    vectors.grad = gradient.clone()
    Sphere([vectors], lr=0.2, momentum=0.0).step()
    direction = start / start.norm()
    tangent = gradient - (gradient @ direction.T) * direction
    expected = direction - 0.2 * tangent / tangent.norm()
    torch.testing.assert_close(vectors.detach(), start.norm() * expected / expected.norm())
    angle = torch.arccos(F.cosine_similarity(vectors.detach(), start))
    assert angle.item() == pytest.approx(torch.arctan(torch.tensor(0.2)).item(), rel=1e-4)


def test_sphere_anchors_vectors_to_the_start():
    runs = [turned(100, lr=0.1, anchor_strength=strength) for strength in (0.0, 0.5)]
    loose, anchored = (F.cosine_similarity(first, last) for first, last in runs)
    assert (anchored > loose + 0.1).all()


def test_a_group_shares_updates():
    """Each takes its own turn and twice the mean of all; one without a gradient takes that alone."""
    start = torch.eye(WIDTH)[:3].unsqueeze(1)  # three matrices of one vector, at right angles
    vectors = [row.clone().requires_grad_() for row in start]
    own = [torch.eye(WIDTH)[10:11], torch.eye(WIDTH)[11:12]]  # tangents of all three
    for matrix, turn in zip(vectors, own, strict=False):
        matrix.grad = -5 * turn
    Sphere([{"params": vectors, "shared_update_weight": 2.0}], lr=0.1, momentum=0.0).step()
    common = own[0] + own[1]  # 2 x (own[0] + own[1]) / 2
    for matrix, before, turn in zip(vectors, start, [*own, torch.zeros(1, WIDTH)], strict=True):
        expected = F.normalize(before + 0.1 * (turn + common))
        torch.testing.assert_close(matrix.detach(), expected)


def test_vectors_without_gradient_stay():
    vectors = torch.randn(1, WIDTH).requires_grad_()
    before = vectors.detach().clone()
    Sphere([vectors], lr=0.3).step()
    assert torch.equal(vectors.detach(), before)


def test_average_of_directions_keeps_the_length():
    embedding = Embedding("S*", {"clip_l": torch.eye(4)[:1] * 3})
    ema = embedding.snapshot()
    embedding.vectors["clip_l"] = torch.eye(4)[1:2] * 3
    update_ema(ema, embedding, 0.5, keep_length=True)
    torch.testing.assert_close(ema.vectors["clip_l"], torch.tensor([[3 / 2**0.5, 3 / 2**0.5, 0, 0]]))
    update_ema(ema, embedding, 0.0, keep_length=False)
    torch.testing.assert_close(ema.vectors["clip_l"], embedding.vectors["clip_l"])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_settings_that_an_optimizer_ignores_are_refused(name):
    """Every setting that it is said to ignore, and none at its default."""
    check_settings(TrainConfig(optimizer=name))
    assert OPTIMIZERS[name].ignores
    for setting in OPTIMIZERS[name].ignores:
        with pytest.raises(UserError, match=f"{setting} has no effect with optimizer {name}: set it back to"):
            check_settings(TrainConfig(**{"optimizer": name, setting: 0.05}))


def test_every_optimizer_has_a_name_in_the_settings():
    assert tuple(OPTIMIZERS) == get_args(OptimizerName)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_zero_means_the_optimizers_own_rate(name):
    assert learning_rate(TrainConfig(optimizer=name)) == OPTIMIZERS[name].learning_rate > 0
    assert learning_rate(TrainConfig(optimizer=name, learning_rate=0.01)) == 0.01
    tokens = TrainedTokens(Embedding("S*", {"clip_l": torch.ones(1, 4)}).trainable())
    (group,) = make_optimizer(tokens, TrainConfig(optimizer=name)).param_groups
    assert group["lr"] == OPTIMIZERS[name].learning_rate


# The vocabulary ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("token", "word"),
    [("cat</w>", "cat"), ("cat", ""), ("\u2581cat", "cat"), ("\u0120cat", "cat"), ("at</w>", ""), ("!!!</w>", "")],
)
def test_whole_words(token, word):
    assert word_of(token) == word


def test_nearest_words_and_gains():
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(4, WIDTH, generator=generator)
    known = Vocabulary(table, {0: "cat</w>", 1: "dog</w>", 2: "tree</w>", 3: "##"}, lambda _text: [0])
    rows = torch.stack([table[1] + 0.01 * table[2], table[0], torch.zeros(WIDTH)])
    dog, cat, nothing = known.nearest(rows, 9)
    assert ([word for word, _ in (dog[0], cat[0])], len(dog), nothing) == (["dog", "cat"], 3, [])
    assert dog[0][1] == pytest.approx(1, abs=1e-3)
    words, gains = known.first_order_gain(-table[[2, 0]])
    assert [words[best] for best in gains.argmax(1)] == ["tree", "cat"]
