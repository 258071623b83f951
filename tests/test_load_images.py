"""Load Images on real files."""

import io
import logging
import os
import re
import struct
import subprocess
import sys
import unicodedata
import zlib
from pathlib import Path

import folder_paths
import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from pillow_heif import from_pillow
from ti_pack.nodes.load_images import LoadImages  # pyright: ignore[reportMissingImports]  made by conftest.py
from ti_pack.nodes.picture_folders import VARIABLE  # pyright: ignore[reportMissingImports]
from ti_pack.nodes.pictures_route import list_pictures  # pyright: ignore[reportMissingImports]

from textual_inversion import UserError, picture_files
from textual_inversion.dataset import resize
from textual_inversion.picture_files import KINDS, NO_WHITE, NOTHING_OPAQUE, decoded, picture_info, thumbnail
from textual_inversion.pictures import caption_text, folder_files, load_folder


def picture(width=32, height=24):
    """Red on the left, blue on the right."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[:, : width // 2, 0] = 255
    pixels[:, width // 2 :, 2] = 255
    return Image.fromarray(pixels)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp", "tiff", "avif"])
def test_formats_pillow_reads(tmp_path, suffix):
    picture().save(tmp_path / f"a.{suffix}")
    (image,), (mask,), captions, _ = load_folder(tmp_path, 0, False)
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
    _, _, captions, _ = load_folder(tmp_path, 0, False)
    assert captions == ["a caption", "", "großes Bild"]


def test_exif_rotation_is_applied(tmp_path):
    image = picture()
    exif = image.getexif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise to view
    image.save(tmp_path / "a.jpg", exif=exif)
    (loaded,), *_ = load_folder(tmp_path, 0, False)
    assert loaded.shape == (1, 32, 24, 3)
    assert loaded[0, 2, 12, 0] > 0.8, "what was left is now on top"


def test_alpha_becomes_a_mask_and_white(tmp_path):
    rgba = picture().convert("RGBA")
    alpha = np.zeros((24, 32), np.uint8)
    alpha[:, :16] = 255
    rgba.putalpha(Image.fromarray(alpha))
    rgba.save(tmp_path / "a.png")
    (image,), (mask,), *_ = load_folder(tmp_path, 0, False)
    assert torch.equal(mask[0, :, :16], torch.ones(24, 16))
    assert torch.equal(mask[0, :, 16:], torch.zeros(24, 16))
    assert torch.equal(image[0, :, 16:], torch.ones(24, 16, 3))
    assert image[0, 0, 0].tolist() == [1, 0, 0]


def test_sixteen_bits(tmp_path):
    Image.fromarray(np.full((16, 16), 32768, np.uint16)).save(tmp_path / "a.png")
    (image,), *_ = load_folder(tmp_path, 0, False)
    assert image.mean().item() == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize(
    ("size", "square", "shape"),
    [(0, False, (96, 200)), (0, True, (96, 96)), (64, True, (64, 64)), (64, False, (40, 88))],
)
def test_size_and_crop(tmp_path, size, square, shape):
    picture(200, 100).save(tmp_path / "a.png")
    (image,), (mask,), *_ = load_folder(tmp_path, size, square)
    assert image.shape[1:3] == shape
    assert mask.shape[1:] == shape


def test_proportions_are_kept(tmp_path):
    """A circle stays a circle: never squashed to a square."""
    y, x = np.mgrid[:120, :300]
    disc = ((x - 150) ** 2 + (y - 60) ** 2 < 40**2).astype(np.uint8) * 255
    Image.fromarray(disc).save(tmp_path / "a.png")
    (image,), *_ = load_folder(tmp_path, 96, False)
    inside = image[0, ..., 0] > 0.5
    height, width = inside.any(1).sum().item(), inside.any(0).sum().item()
    assert abs(height - width) <= 2


def test_stray_files_are_named_and_left_out(tmp_path, caplog):
    picture().save(tmp_path / "a.png")
    (tmp_path / "notes.md").write_text("hello")
    (tmp_path / "a.txt").write_text("a caption")
    for name in (".hidden", "Thumbs.db", "desktop.ini"):
        (tmp_path / name).write_text("x")
    (tmp_path / "folder").mkdir()
    with caplog.at_level(logging.WARNING):
        images, _, _, left_out = load_folder(tmp_path, 0)
    assert len(images) == 1
    assert left_out == [
        ("notes.md", "it is damaged, or no picture of a kind that is read here: save it as PNG or JPEG")
    ]
    assert "1 of the files" in caplog.text
    assert "notes" not in caplog.text, "whoever can open the server's log would see names of files"


def png(*chunks: tuple[bytes, bytes], width: int = 16, height: int = 16, depth: int = 8, colour: int = 0) -> bytes:
    """A PNG of these chunks behind the header."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    parts = [b"\x89PNG\r\n\x1a\n"]
    for kind, data in ((b"IHDR", header), *chunks, (b"IEND", b"")):
        parts.append(struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)))
    return b"".join(parts)


def saved(kind: str, image: Image.Image | None = None, **options) -> bytes:
    stream = io.BytesIO()
    (image or picture(64, 64)).save(stream, kind, **options)
    return stream.getvalue()


def ramp(kind: type, high: float, low: float = 0) -> Image.Image:
    """Grey numbers from left to right."""
    return Image.fromarray(np.linspace(low, high, 16)[None].repeat(16, 0).astype(kind))


ROWS = (b"IDAT", zlib.compress(bytes(17 * 16)))
NO_PICTURE = "it is damaged, or no picture of a kind that is read here"
HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(40)
BAD_FILES = {
    "empty.png": (b"", "it is empty"),
    "page.jpg": (b"<html><body>Not found</body></html>", NO_PICTURE),
    "pointer.png": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", NO_PICTURE),
    "half.png": (saved("PNG")[:100], NO_PICTURE),
    "half.jpg": (saved("JPEG")[:400], NO_PICTURE),
    "half.webp": (saved("WEBP")[:100], NO_PICTURE),
    "half.avif": (saved("AVIF")[:300], NO_PICTURE),
    "half.tiff": (saved("TIFF")[:200], NO_PICTURE),
    "profile.png": (png((b"iCCP", b"x"), ROWS), NO_PICTURE),
    "head.jpg": (b"\xff\xd8\xff no picture", NO_PICTURE),
    "script.png": (saved("EPS"), NO_PICTURE),
    "layers.png": (b"8BPS" + bytes(60), NO_PICTURE),
    "texture.png": (b"DDS " + bytes(124), NO_PICTURE),
    "drawing.jpg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", NO_PICTURE),
    "phone.heic": (HEIC, NO_PICTURE),
    "bomb.png": (png(ROWS, width=20_000, height=20_000, depth=1), "pixels"),
    "bomb.gif": (b"GIF89a\xff\xff\xff\xff\0\0\0,\0\0\0\0\xff\xff\xff\xff\0\2\2D\1\0;", "pixels"),
    "thin.png": (saved("PNG", picture(1, 400)), "smaller than 8 pixels"),
    "tiny.png": (saved("PNG", picture(6, 5)), "smaller than 8 pixels"),
    "clear.png": (saved("PNG", Image.new("RGBA", (64, 64), "#ff000000")), NOTHING_OPAQUE),
    "clear.webp": (saved("WEBP", Image.new("RGBA", (64, 64), "#ff000000"), lossless=True), NOTHING_OPAQUE),
    "clear.gif": (saved("GIF", Image.new("P", (64, 64)), transparency=0), NOTHING_OPAQUE),
    "labels.tiff": (saved("TIFF", ramp(np.int32, 5)), NO_WHITE),
    "labels.png": (saved("PNG", ramp(np.uint16, 5)), NO_WHITE),
    "counts.tiff": (saved("TIFF", ramp(np.int32, 2**31 - 1)), NO_WHITE),
    "light.tiff": (saved("TIFF", ramp(np.float32, 1e6)), NO_WHITE),
    "normals.tiff": (saved("TIFF", ramp(np.float32, 1, low=-1)), NO_WHITE),
    "nan.tiff": (saved("TIFF", ramp(np.float32, float("nan"))), NO_WHITE),
    "infinite.tiff": (saved("TIFF", ramp(np.float32, float("inf"))), NO_WHITE),
    # Colours of 16 bits, of which only the lower 8 are used.
    "low.png": (png((b"IDAT", zlib.compress(bytes([0, *[0, 255] * 48] * 16))), depth=16, colour=2), NO_WHITE),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_file_that_cannot_be_used_is_named_with_its_reason(tmp_path, name):
    content, reason = BAD_FILES[name]
    (tmp_path / "a.png").write_bytes(saved("PNG"))
    (tmp_path / name).write_bytes(content)
    images, masks, captions, left_out = load_folder(tmp_path, 64)
    assert len(images) == len(masks) == len(captions) == 1
    ((named, why),) = left_out
    assert named == name
    assert reason in why
    with pytest.raises(UserError, match=reason):
        _ = picture_info(tmp_path / name), thumbnail(tmp_path / name, 64)


def test_a_picture_whose_used_part_is_transparent_is_left_out(tmp_path):
    """The list cannot know it, but the node can: nothing would be learned from its mask."""
    picture().save(tmp_path / "a.png")
    edges = Image.new("RGBA", (96, 32), "#ff0000ff")
    edges.paste((0, 0, 0, 0), (32, 0, 64, 32))
    edges.save(tmp_path / "edges.png")
    assert load_folder(tmp_path, 0).left_out == []
    assert load_folder(tmp_path, 0, square=True).left_out == [("edges.png", NOTHING_OPAQUE)]
    (tmp_path / "a.png").unlink()
    with pytest.raises(UserError, match="none of its files can be used, the first because nothing in it is opaque"):
        load_folder(tmp_path, 64, square=True)


@pytest.mark.parametrize(("name", "brand"), [("phone.heic", b"heic"), ("phone.jpg", b"mif1")])
def test_heic_is_named_where_pillow_heif_is_missing(tmp_path, monkeypatch, name, brand):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    monkeypatch.setattr(Image, "OPEN", {kind: opens for kind, opens in Image.OPEN.items() if kind != "HEIF"})
    (tmp_path / "a.png").write_bytes(saved("PNG"))
    (tmp_path / name).write_bytes(HEIC.replace(b"heic", brand, 1))
    picture_files._kinds.cache_clear()
    try:
        ((named, why),) = load_folder(tmp_path, 64).left_out
    finally:
        picture_files._kinds.cache_clear()
    assert (named, why[:26]) == (name, "HEIC is not supported here")


def test_heic_is_read_where_pillow_heif_is_installed(tmp_path):
    from_pillow(picture(64, 64)).save(tmp_path / "a.heic")
    assert load_folder(tmp_path, 0).images[0].shape == (1, 64, 64, 3)


def test_damaged_pictures_of_every_kind_never_stop_a_folder(tmp_path):
    """Cut and flipped at random: loaded or left out, nothing else."""
    chance = np.random.default_rng(0)
    for kind in set(KINDS) - {"HEIF"}:
        whole = np.frombuffer(saved(kind, picture(32, 32)), np.uint8)
        for number in range(30):
            broken = whole[: chance.integers(1, len(whole) + 1)].copy()
            broken[chance.integers(0, len(broken), 5)] = chance.integers(0, 256, 5)
            (tmp_path / f"{kind}{number}").write_bytes(broken.tobytes())
    picture().save(tmp_path / "whole.png")
    loaded = load_folder(tmp_path, 32)
    assert len(loaded.images) + len(loaded.left_out) == 30 * (len(KINDS) - 1) + 1
    assert len(loaded.left_out) > 30


@pytest.mark.parametrize(
    ("kind", "count", "value"),
    [
        (2, 2, b"6\0"),
        (2, 2, b"\xff\0"),
        (3, 1, b"\x63\0"),
        (3, 1, b"\0"),
        (11, 1, b"\0\0\xd0\x40"),
        (7, 9, b""),
    ],
    ids=["text", "bytes", "99", "0", "6.5", "beyond the end"],
)
def test_a_strange_orientation_means_upright(tmp_path, kind, count, value):
    entry = struct.pack("<HHI", 0x0112, kind, count) + value.ljust(4, b"\0")
    exif = b"Exif\0\0II*\0\x08\0\0\0\x01\0" + entry + bytes(4)
    for name in ("a.jpg", "a.png", "a.webp"):
        picture(32, 24).save(tmp_path / name, exif=exif)
        assert picture_info(tmp_path / name)[:2] == (32, 24)
        assert decoded(tmp_path / name).size == (32, 24)


@pytest.mark.parametrize("turned", range(1, 9))
def test_every_orientation_is_turned_upright(tmp_path, turned):
    exif = Image.Exif()
    exif[0x0112] = turned
    picture(32, 24).save(tmp_path / "a.png", exif=exif)
    with Image.open(tmp_path / "a.png") as stored:
        right = ImageOps.exif_transpose(stored).convert("RGBA")
    assert decoded(tmp_path / "a.png").tobytes() == right.tobytes()


@pytest.mark.parametrize(
    "pixels",
    [
        np.full((16, 16), 0.5, np.float32),
        np.full((16, 16), 128, np.float32),
        np.full((16, 16), 32768, np.uint16),
        np.full((16, 16), 32768, ">u2"),
        np.full((16, 16), 32768, np.int32),
        np.full((16, 16), 128, np.uint8),
    ],
    ids=lambda pixels: f"{pixels.dtype.str} {pixels.max()}",
)
def test_grey_of_every_depth(tmp_path, pixels):
    pixels[0, 0], pixels[0, 1] = 0, {0.5: 1, 128: 255, 32768: 65535}[pixels.max().item()]
    if pixels.dtype.str == ">u2":
        Image.frombytes("I;16B", (16, 16), pixels.tobytes()).save(tmp_path / "a.tiff")
    else:
        Image.fromarray(pixels).save(tmp_path / "a.tiff")
    image = load_folder(tmp_path, 0).images[0]
    assert image.mean().item() == pytest.approx(0.5, abs=0.01)
    assert (image[0, 0, 0, 0].item(), image[0, 0, 1, 0].item()) == (0, 1)


@pytest.mark.parametrize("compression", [None, "tiff_lzw"])
@pytest.mark.parametrize("kind", [np.uint16, np.int32, np.float32])
@pytest.mark.parametrize("white", [1, 255, 1023, 4095, 65535])
def test_white_is_found_where_a_format_does_not_say_it(tmp_path, kind, white, compression):
    """They came out black or white."""
    ramp(kind, white).save(tmp_path / "a.tiff", compression=compression)
    row = load_folder(tmp_path, 0).images[0][0, 0, :, 0]
    assert (row[0], row[-1]) == (0, 1)
    assert row[8].item() == pytest.approx(0 if white == 1 and kind is not np.float32 else 8 / 15, abs=0.01)
    with Image.open(io.BytesIO(thumbnail(tmp_path / "a.tiff", 16))) as small:
        assert small.convert("L").getextrema() == pytest.approx((0, 255), abs=8)


@pytest.mark.parametrize("white", [1, 255])
def test_a_little_more_than_white_comes_from_scaling(tmp_path, white):
    ramp(np.float32, 1.05 * white, -0.05 * white).save(tmp_path / "a.tiff")
    row = load_folder(tmp_path, 0).images[0][0, 0, :, 0]
    assert row[5].item() == pytest.approx(-0.05 + 1.1 / 3, abs=0.01)


@pytest.mark.parametrize("kind", [np.uint16, np.float32])
def test_tiffs_whose_white_is_zero(tmp_path, kind):
    ramp(kind, 65535).save(tmp_path / "a.tiff", tiffinfo={262: 0})
    row = load_folder(tmp_path, 0).images[0][0, 0, :, 0]
    assert (row[0], row[-1]) == (1, 0)


CAPTION_FILES = ("a.txt", "a.TXT", "a.png.txt", "a.caption", "A.txt", "a.png.caption")


@pytest.mark.parametrize("name", CAPTION_FILES)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le"])
def test_captions_of_every_name_and_encoding(tmp_path, name, encoding):
    picture().save(tmp_path / "a.png")
    picture().save(tmp_path / "b.png")
    (tmp_path / name).write_bytes(f"{'' if encoding == 'utf-16-le' else 'ß '}a caption\r\n".encode(encoding))
    _, _, captions, left_out = load_folder(tmp_path, 0)
    assert captions == ["a caption" if encoding == "utf-16-le" else "ß a caption", ""]
    assert left_out == []


@pytest.mark.parametrize(("of_picture", "of_caption"), [("NFC", "NFD"), ("NFD", "NFC")])
def test_accents_of_file_names_are_spelled_in_two_ways(tmp_path, of_picture, of_caption):
    picture().save(tmp_path / unicodedata.normalize(of_picture, "café.png"))
    (tmp_path / unicodedata.normalize(of_caption, "Café.txt")).write_text("a caption")
    assert load_folder(tmp_path, 0).captions == ["a caption"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("großes Bild".encode("latin-1"), "not UTF-8"),
        ("大きい".encode("shift-jis"), "not UTF-8"),
        (b"\x89PNG\r\n\x1a\n\0\0\0", "not UTF-8"),
        (b"a caption\0\0\0", "not text"),
        (b"x" * 50_000_000, "longer than 65,536 bytes"),
    ],
    ids=["latin", "shift-jis", "png", "nul", "long"],
)
def test_a_caption_that_cannot_be_used_is_left_out_alone(tmp_path, content, reason):
    picture().save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_bytes(content)
    images, _, captions, left_out = load_folder(tmp_path, 0)
    assert (len(images), captions) == (1, [""])
    ((name, why),) = left_out
    assert name == "a.txt"
    assert reason in why
    with pytest.raises(UserError, match=reason):
        caption_text(content)


def test_links_to_elsewhere_are_left_out(tmp_path):
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    inside.mkdir()
    outside.mkdir()
    for name in ("a.png", "b.png"):
        picture().save(outside / name)
    (outside / "a.txt").write_text("a secret")
    picture().save(inside / "a.png")
    (inside / "a.txt").symlink_to(outside / "a.txt")
    (inside / "b.png").symlink_to(outside / "b.png")
    (inside / "c.png").symlink_to(inside / "a.png")
    _, _, captions, left_out = load_folder(inside, 0, roots=[inside])
    assert captions == ["", ""]
    assert [file.name for file in left_out] == ["a.txt", "b.png"]
    assert len(load_folder(inside, 0).images) == 3, "on the command line, links are followed"


LARGE = """
import resource, sys
from pathlib import Path
import numpy as np
from PIL import Image
from textual_inversion.pictures import load_folder
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
(image,) = load_folder(Path(sys.argv[1]), 512).images
print(*image.shape[1:3], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.parametrize(("suffix", "mib"), [("jpg", 120), ("png", 700)])
def test_a_large_picture_is_loaded_in_bounded_memory(tmp_path, suffix, mib):
    """100 megapixels: a JPEG is decoded at a reduced size, of others only the pixels themselves are held."""
    Image.new("RGB", (12_000, 8_400), "teal").save(tmp_path / f"a.{suffix}")
    command = [sys.executable, "-c", LARGE, str(tmp_path)]
    height, width, more = map(int, subprocess.run(command, capture_output=True, check=True, text=True).stdout.split())
    assert (height, width) == (424, 608)
    assert more / 1024 < mib


def test_a_reduced_picture_looks_the_same(tmp_path):
    y, x = np.mgrid[:2000, :3000]
    waves = np.stack([127 + 120 * np.sin(x / 90), 127 + 120 * np.cos(y / 70), (x + y) / 20 % 256], -1).astype(np.uint8)
    Image.fromarray(waves).save(tmp_path / "a.png")
    Image.fromarray(waves).save(tmp_path / "b.jpg", quality=98)
    whole = resize(torch.from_numpy(waves / 255).float()[None], 256)
    for image in load_folder(tmp_path, 256).images:
        assert image.shape == whole.shape
        assert (image - whole).abs().mean() < 0.01


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

    files = [file for file in folder_files(tmp_path).pictures if file.suffix != ".md"]
    infos = [picture_info(file) for file in files]
    images, masks, *_ = load_folder(tmp_path, 0, False)
    assert len(infos) == len(images) == 9
    assert [(info.height, info.width) for info in infos] == [tuple(image.shape[1:3]) for image in images]
    assert [info.masked for info in infos] == [mask.min().item() < 1 for mask in masks]
    assert sum(info.masked for info in infos) == 2


def test_empty_folder_is_an_error(tmp_path):
    with pytest.raises(UserError, match="There are no pictures in"):
        load_folder(tmp_path, 0, False)


def test_a_folder_that_must_not_be_read(input_folder, monkeypatch):
    """Alone it is an error. Of a library it is left out: it is listed without it, and does not run each time."""
    for name in ("a", "b"):
        (input_folder / "library" / name).mkdir(parents=True)
        picture().save(input_folder / "library" / name / "1.png")
    locked, first = input_folder / "library/b", Path.iterdir

    def iterdir(folder):
        if folder == locked:
            raise PermissionError(13, "Permission denied")
        return first(folder)

    monkeypatch.setattr(Path, "iterdir", iterdir)
    reason = "The folder 'b' cannot be read (permission denied): choose another one."
    left_out = [{"name": "b/", "reason": reason}]
    with pytest.raises(UserError, match=re.escape(reason)):
        load("library/b")
    assert load("library").ui == {"left_out": left_out}
    ((name, _, _),) = LoadImages.fingerprint_inputs("library", "", "square", 64)
    assert Path(name).parts[-2:] == ("a", "1.png")
    listed = list_pictures("library", "")
    assert ([concept["name"] for concept in listed["concepts"]], listed["left_out"]) == (["a"], left_out)


def load(folder: str = "", path: str = ""):
    return LoadImages.execute(folder, path, "square", 64)


@pytest.fixture
def input_folder():
    root = Path(folder_paths.get_input_directory())
    root.mkdir(exist_ok=True)
    return root


@pytest.mark.parametrize("folder", ["", " ", "nowhere", "nowhere/deeper", "empty"])
def test_a_folder_without_pictures_says_what_to_do(input_folder, folder):
    (input_folder / "empty").mkdir(exist_ok=True)
    with pytest.raises(UserError, match=r"Load Images has no pictures: press 'Add pictures'"):
        load(folder)
    assert LoadImages.fingerprint_inputs(folder, "", "square", 64) == []
    assert LoadImages.validate_inputs(folder) is True


@pytest.mark.parametrize(
    "folder", ["..", "../..", "a/../../x", "/etc", "a\0b", "x" * 300, "out"], ids=lambda folder: folder[:9]
)
def test_folder_stays_inside_the_input_folder(input_folder, tmp_path, folder):
    link = input_folder / "out"
    link.symlink_to(tmp_path, target_is_directory=True)
    try:
        with pytest.raises(UserError, match="is no folder inside ComfyUI's input folder"):
            load(folder)
    finally:
        link.unlink()


def test_what_may_not_be_read_sounds_like_what_is_not_there(input_folder, tmp_path):
    """Nobody can find out over HTTP which folders there are."""
    picture().save(tmp_path / "a.png")
    messages = set()
    for path in (tmp_path, tmp_path / "a.png", tmp_path / "nothing", input_folder / "nothing", "/etc", "//host/share"):
        with pytest.raises(UserError, match=VARIABLE) as error:
            load(path=str(path))
        messages.add(str(error.value).replace(repr(str(path)), "PATH"))
    assert len(messages) == 1


@pytest.mark.parametrize("path", [r"\\host\share\pictures", "//host/share", "file://host/share", "//host/../../x"])
def test_a_share_on_another_computer_is_never_asked(path, monkeypatch):
    asked = []
    for name in ("stat", "lstat", "open", "scandir", "listdir", "readlink"):
        first = getattr(os, name)
        monkeypatch.setattr(
            os, name, lambda at, *rest, _first=first, **more: (asked.append(str(at)), _first(at, *rest, **more))[1]
        )
    with pytest.raises(UserError):
        load(path=path)
    assert not [at for at in asked if "host" in at]


@pytest.mark.parametrize("allowed", ["{}", '"{}"', "~"])
def test_paths_as_people_paste_them(input_folder, tmp_path, monkeypatch, allowed):
    monkeypatch.setenv(VARIABLE, f"/nowhere:{allowed.format(tmp_path)}")
    monkeypatch.setenv("HOME", str(tmp_path))
    place = tmp_path / "my cat"
    place.mkdir()
    picture().save(place / "a.png")
    paths = (f"{place}", f"  {place}/ ", f'"{place}"', f"'{place}'", place.as_uri(), "~/my cat", f"{place}/../my cat")
    for path in (*paths, f"file://localhost{place.as_uri()[7:]}"):
        images, masks, captions, concepts = load(path=path).args
        assert (len(images), len(masks), captions, concepts) == (1, 1, [""], ["<my_cat>"])
    for path, message in (("my cat", "is not a full path"), (f"{place}/a.png", "is a file: enter the folder")):
        with pytest.raises(UserError, match=message):
            load(path=path)


@pytest.mark.parametrize("place", ["input", "output", "temp"])
def test_comfyui_own_folders_may_be_read(place):
    folder = Path(getattr(folder_paths, f"get_{place}_directory")()) / "some"
    folder.mkdir(parents=True)
    picture().save(folder / "a.png")
    (folder / "b.png").write_bytes(b"broken")
    try:
        output = load(path=str(folder))
        assert len(output.args[0]) == 1
        assert [file["name"] for file in output.ui["left_out"]] == ["b.png"]
    finally:
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()


def test_fingerprint_sees_new_and_changed_files(tmp_path, monkeypatch):
    monkeypatch.setenv(VARIABLE, str(tmp_path))

    def fingerprint():
        return LoadImages.fingerprint_inputs(".", str(tmp_path), "square", 64)

    picture().save(tmp_path / "a.png")
    first = fingerprint()
    assert fingerprint() == first
    (tmp_path / "a.txt").write_text("caption")
    second = fingerprint()
    assert second != first
    picture(64, 64).save(tmp_path / "a.png")
    third = fingerprint()
    assert third != second
    (tmp_path / "inside").mkdir()
    picture().save(tmp_path / "inside/b.png")
    for name in (".DS_Store", "Thumbs.db", "desktop.ini"):
        (tmp_path / name).write_bytes(b"written by Finder or Explorer")
    assert fingerprint() == third, "neither a folder beside pictures nor a hidden file is read"
    (tmp_path / "a.png").unlink()
    concepts = fingerprint()
    picture(64, 64).save(tmp_path / "inside/b.png")
    assert fingerprint() != concepts
