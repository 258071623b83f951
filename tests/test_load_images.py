"""Load Images on real files."""

import logging

import numpy as np
import pytest
import torch
from PIL import Image
from ti_pack.nodes.load_images import LoadImages  # pyright: ignore[reportMissingImports]  made by conftest.py

from textual_inversion import UserError
from textual_inversion.pictures import load_folder, picture_files, picture_info


def picture(width=32, height=24):
    """Red on the left, blue on the right."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[:, : width // 2, 0] = 255
    pixels[:, width // 2 :, 2] = 255
    return Image.fromarray(pixels)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp", "tiff", "avif"])
def test_formats_pillow_reads(tmp_path, suffix):
    picture().save(tmp_path / f"a.{suffix}")
    (image,), (mask,), captions = load_folder(tmp_path, 0, False)
    assert image.shape == (1, 24, 32, 3)
    assert image.dtype == torch.float32
    assert image[0, 12, 4, 0] > 0.8
    assert image[0, 12, 28, 2] > 0.8
    assert mask.shape == (1, 24, 32)
    assert mask.min() == 1
    assert captions == [""]


def test_order_is_by_name_and_captions_belong(tmp_path):
    for name in ("b", "a", "c"):
        picture().save(tmp_path / f"{name}.png")
    (tmp_path / "a.txt").write_text("\ufeffa caption\n", encoding="utf-8")
    (tmp_path / "c.txt").write_text("großes Bild", encoding="utf-8")
    _, _, captions = load_folder(tmp_path, 0, False)
    assert captions == ["a caption", "", "großes Bild"]


def test_exif_rotation_is_applied(tmp_path):
    image = picture()
    exif = image.getexif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise to view
    image.save(tmp_path / "a.jpg", exif=exif)
    (loaded,), _, _ = load_folder(tmp_path, 0, False)
    assert loaded.shape == (1, 32, 24, 3)
    assert loaded[0, 2, 12, 0] > 0.8, "what was left is now on top"


def test_alpha_becomes_a_mask_and_white(tmp_path):
    rgba = picture().convert("RGBA")
    alpha = np.zeros((24, 32), np.uint8)
    alpha[:, :16] = 255
    rgba.putalpha(Image.fromarray(alpha))
    rgba.save(tmp_path / "a.png")
    (image,), (mask,), _ = load_folder(tmp_path, 0, False)
    assert torch.equal(mask[0, :, :16], torch.ones(24, 16))
    assert torch.equal(mask[0, :, 16:], torch.zeros(24, 16))
    assert torch.equal(image[0, :, 16:], torch.ones(24, 16, 3))
    assert image[0, 0, 0].tolist() == [1, 0, 0]


def test_sixteen_bits(tmp_path):
    Image.fromarray(np.full((16, 16), 32768, np.uint16)).save(tmp_path / "a.png")
    (image,), _, _ = load_folder(tmp_path, 0, False)
    assert image.mean().item() == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize(
    ("size", "square", "shape"),
    [(0, False, (96, 200)), (0, True, (96, 96)), (64, True, (64, 64)), (64, False, (40, 88))],
)
def test_size_and_crop(tmp_path, size, square, shape):
    picture(200, 100).save(tmp_path / "a.png")
    (image,), (mask,), _ = load_folder(tmp_path, size, square)
    assert image.shape[1:3] == shape
    assert mask.shape[1:] == shape


def test_proportions_are_kept(tmp_path):
    """A circle stays a circle: never squashed to a square."""
    y, x = np.mgrid[:120, :300]
    disc = ((x - 150) ** 2 + (y - 60) ** 2 < 40**2).astype(np.uint8) * 255
    Image.fromarray(disc).save(tmp_path / "a.png")
    (image,), _, _ = load_folder(tmp_path, 96, False)
    inside = image[0, ..., 0] > 0.5
    height, width = inside.any(1).sum().item(), inside.any(0).sum().item()
    assert abs(height - width) <= 2


def test_stray_files_are_named_and_left_out(tmp_path, caplog):
    picture().save(tmp_path / "a.png")
    (tmp_path / "notes.md").write_text("hello")
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff no picture")
    (tmp_path / "a.txt").write_text("a caption")
    (tmp_path / ".hidden").write_text("x")
    (tmp_path / "folder").mkdir()
    with caplog.at_level(logging.WARNING):
        images, _, _ = load_folder(tmp_path, 0, False)
    assert len(images) == 1
    assert "broken.jpg, notes.md" in caplog.text
    assert "hidden" not in caplog.text


def test_truncated_picture_is_left_out(tmp_path, caplog):
    picture(64, 64).save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    (tmp_path / "b.png").write_bytes(data[: len(data) // 2])
    with caplog.at_level(logging.WARNING):
        images, _, _ = load_folder(tmp_path, 0, False)
    assert len(images) == 1
    assert "b.png" in caplog.text


def test_caption_in_another_encoding_is_an_error(tmp_path):
    picture().save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("großes Bild", encoding="latin-1")
    with pytest.raises(UserError, match=r"a\.txt is not UTF-8"):
        load_folder(tmp_path, 0, False)


def test_picture_info_agrees_with_what_is_loaded(tmp_path):
    rgba = picture(40, 24).convert("RGBA")
    rgba.save(tmp_path / "opaque.png")
    rgba.putpixel((0, 0), (0, 0, 0, 200))
    rgba.save(tmp_path / "translucent.webp", lossless=True)
    palette = picture(40, 24).convert("P")
    palette.save(tmp_path / "palette.gif", transparency=palette.getpixel((0, 0)))
    Image.fromarray(np.full((24, 40), 32768, np.uint16)).save(tmp_path / "deep.png")
    exif = Image.Exif()
    exif[0x0112] = 8
    for suffix in ("jpg", "png", "webp", "tiff", "avif"):
        picture(40, 24).save(tmp_path / f"turned.{suffix}", exif=exif)
    (tmp_path / "notes.md").write_text("no picture")

    files = picture_files(tmp_path)
    infos = [info for info in map(picture_info, files) if info is not None]
    images, masks, _ = load_folder(tmp_path, 0, False)
    assert len(files) - 1 == len(infos) == len(images) == 9
    assert [(info.height, info.width) for info in infos] == [tuple(image.shape[1:3]) for image in images]
    assert [info.masked for info in infos] == [mask.min().item() < 1 for mask in masks]
    assert sum(info.masked for info in infos) == 2


def test_empty_folder_is_an_error(tmp_path):
    with pytest.raises(UserError, match="There are no pictures in"):
        load_folder(tmp_path, 0, False)


def test_folder_must_exist_and_stay_inside(tmp_path):
    for folder, path, message in (
        ("nowhere", "", "does not exist"),
        ("../..", "", "is outside ComfyUI's input folder"),
        (".", "relative/place", "is not a full path"),
    ):
        with pytest.raises(UserError, match=message):
            LoadImages.execute(folder, path, "square", 64)


def test_fingerprint_sees_new_and_changed_files(tmp_path):
    def fingerprint():
        return LoadImages.fingerprint_inputs(".", str(tmp_path), "square", 64)

    picture().save(tmp_path / "a.png")
    first = fingerprint()
    assert fingerprint() == first
    (tmp_path / "a.txt").write_text("caption")
    second = fingerprint()
    assert second != first
    picture(64, 64).save(tmp_path / "a.png")
    assert fingerprint() != second
