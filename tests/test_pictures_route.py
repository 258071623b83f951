"""What the server shows and changes for Load Images, asked over HTTP as anybody may ask it."""

import io
import struct
import threading
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from dev.comfyui_server import ComfyServer

PICTURES = "/textual_inversion/pictures"
THUMBNAIL = "/textual_inversion/thumbnail"
CAPTION = "/textual_inversion/caption"


def picture(kind: str = "PNG", size: tuple[int, int] = (48, 32), colour: str = "red", **options) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", size, colour).save(stream, kind, **options)
    return stream.getvalue()


def ask(server: ComfyServer, route: str, method: str = "GET", body: bytes = b"", **query: str):
    return server.http.request(method, server.url + route, params=query, data=body, timeout=120)


@pytest.fixture
def folder(server: ComfyServer) -> Iterator[Path]:
    """An empty folder inside input/, and a secret outside of it; what a test makes is removed."""
    outside = server.base / "secret"
    outside.mkdir()
    (outside / "a.png").write_bytes(picture())
    (outside / "a.txt").write_text("a secret")
    made = server.base / "input/listed"
    made.mkdir()
    yield made
    for root in (made, outside):
        for path in sorted(root.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
        root.rmdir()


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_list_is_what_the_node_loads(server, folder):
    turned = Image.Exif()
    turned[0x0112] = 6
    (folder / "turned.jpg").write_bytes(picture("JPEG", exif=turned.tobytes()))
    Image.new("RGBA", (48, 32), (0, 0, 0, 64)).save(folder / "hole.png")
    (folder / "hole.txt").write_text("\ufeffgroße Lücke\n", encoding="utf-8")
    (folder / "notes.md").write_text("no picture")
    answer = ask(server, PICTURES, folder="listed").json()
    assert "listed" in answer["folders"]
    assert "." in answer["folders"]
    hole, upright = answer["pictures"]
    assert (hole["name"], hole["caption"], hole["masked"]) == ("hole.png", "große Lücke", True)
    assert hole["caption_file"] == "hole.txt"
    assert (upright["name"], upright["caption"], upright["masked"]) == ("turned.jpg", "", False)
    assert (upright["width"], upright["height"]) == (32, 48)
    assert [file["name"] for file in answer["left_out"]] == ["notes.md"]
    for side in ("small", "large"):
        small = ask(server, THUMBNAIL, folder="listed", name="turned.jpg", side=side)
        with Image.open(io.BytesIO(small.content)) as shown:
            assert shown.size == (32, 48)


def test_a_folder_of_folders_is_a_list_of_concepts(server, folder):
    for name in ("cat", "my dog", "empty"):
        (folder / name).mkdir()
    for name in ("cat/a.png", "cat/b.png", "my dog/a.png"):
        (folder / name).write_bytes(picture())
    (folder / "notes.md").write_bytes(b"no picture")
    (folder / "cat/notes.md").write_text("no picture")
    for by_name, path in (("listed", ""), ("", f'"{folder}"')):
        answer = ask(server, PICTURES, folder=by_name, path=path).json()
        assert answer["pictures"] == []
        found = [(one["name"], [shown["name"] for shown in one["pictures"]]) for one in answer["concepts"]]
        assert found == [("cat", ["a.png", "b.png"]), ("my dog", ["a.png"])]
        assert [file["name"] for file in answer["left_out"]] == ["notes.md", "cat/notes.md", "empty/"]
        inside = answer["concepts"][1]["place"]
        assert ask(server, THUMBNAIL, **inside, name="a.png").status_code == 200
    inputs = {"folder": "listed", "path": "", "crop": "square", "size": 0}
    graph = {
        "load": {"class_type": "TI_LoadImages", "inputs": inputs},
        "shown": {"class_type": "PreviewAny", "inputs": {"source": ["load", 3]}},
    }
    outputs = server.run(graph).history["outputs"]
    assert outputs["shown"]["text"] == ["<cat>", "<cat>", "<my_dog>"]
    assert [file["name"] for file in outputs["load"]["left_out"]] == ["notes.md", "cat/notes.md", "empty/"]


OUTSIDE = (
    "..",
    "listed/../..",
    "../secret",
    "/",
    "/etc",
    "../listed/../secret",
    "secret/..//../secret",
    "a\0b",
    "x" * 300,
)


@pytest.mark.parametrize("name", OUTSIDE, ids=lambda name: name[:20])
def test_nothing_outside_is_shown_or_changed(server, folder, name):
    secret = server.base / "secret"
    before = files(secret), files(server.base / "input")
    for method, route in (("GET", PICTURES), ("POST", PICTURES), ("DELETE", PICTURES), ("PUT", CAPTION)):
        answer = ask(server, route, method, picture(), folder=name, name="a.png")
        assert answer.status_code == 400, (method, answer.text)
        assert "is no folder inside ComfyUI's input folder" in answer.json()["error"]
    assert ask(server, THUMBNAIL, folder=name, name="a.png").status_code == 400
    assert (files(secret), files(server.base / "input")) == before


@pytest.mark.parametrize(
    "path", ["SECRET", "SECRET/a.png", "NOWHERE", "/etc", "//host/share", "file://host/share", "/\0"]
)
def test_a_path_that_may_not_be_read_answers_like_one_that_is_not_there(server, folder, path):
    path = path.replace("SECRET", str(server.base / "secret")).replace("NOWHERE", str(server.base / "nowhere"))
    answer = ask(server, PICTURES, folder="listed", path=path)
    assert answer.status_code == 400
    assert answer.json()["error"].startswith(("There is no folder", f"{path!r} is not a full path"))
    assert ask(server, THUMBNAIL, folder="listed", path=path, name="a.png").status_code == 400


def test_links_that_lead_outside_are_neither_shown_nor_followed(server, folder):
    secret = server.base / "secret"
    (folder / "out").symlink_to(secret, target_is_directory=True)
    (folder / "b.png").symlink_to(secret / "a.png")
    (folder / "c.png").write_bytes(picture())
    (folder / "c.txt").symlink_to(secret / "a.txt")
    before = files(secret)
    answer = ask(server, PICTURES, folder="listed").json()
    assert [(file["name"], file["caption"]) for file in answer["pictures"]] == [("c.png", "")]
    assert [file["name"] for file in answer["left_out"]] == ["b.png", "c.txt"]
    assert ask(server, PICTURES, folder="listed/out").status_code == 400
    for name in ("b.png", "out/a.png", "../../secret/a.png", "missing.png", ".", ""):
        assert ask(server, THUMBNAIL, folder="listed", name=name).status_code == 400, name
        assert ask(server, PICTURES, "DELETE", folder="listed", name=name).status_code == 400, name
    ask(server, CAPTION, "PUT", b"written", folder="listed", name="c.png")
    assert files(secret) == before


def test_added_pictures_never_replace_anything(server, folder):
    red, blue = picture(), picture(colour="blue")

    def add(name: str, body: bytes) -> str:
        return ask(server, PICTURES, "POST", body, folder="listed", name=name).json()["name"]

    assert add("cat.png", red) == "cat.png"
    assert add("cat.png", red) == "cat.png", "the same picture is not kept twice"
    assert add("cat.png", blue) == "cat (1).png"
    assert add("Cat.jpg", blue) == "Cat (2).jpg", "cat.txt would be the caption of both"
    with ThreadPoolExecutor(8) as pool:
        bodies = [picture(size=(20 + number, 20)) for number in range(16)]
        assert len(set(pool.map(lambda body: add("dog.png", body), bodies))) == 16
    assert sorted(files(folder).values()) == sorted([red, blue, blue, *bodies])


@pytest.mark.parametrize(
    ("name", "there"),
    [
        ("../../a.png", "_.._a.png"),
        ("/etc/a.png", "_etc_a.png"),
        (r"..\a.png", "_a.png"),
        ("a\0b?.png", "a_b_.png"),
        (".png", "png"),
        ("ß" * 300 + ".png", "ß" * 90 + ".png"),
        ("猫 1.png", "猫 1.png"),
    ],
    ids=lambda name: name[:12],
)
def test_names_become_names_that_every_system_takes(server, folder, name, there):
    assert ask(server, PICTURES, "POST", picture(), folder="listed", name=name).json()["name"] == there
    assert list(files(folder)) == [there]


@pytest.mark.parametrize(
    ("name", "body", "reason"),
    [
        ("a.png", b"", "it is empty"),
        ("a.png", b"<html>", "no picture of a kind that is read"),
        ("a.png", picture()[:60], "it is damaged"),
        ("a.png", picture("EPS"), "no picture of a kind that is read"),
        ("a.png", picture(size=(4, 4)), "smaller than 8 pixels"),
        ("a.txt", picture(), "its name is that of a caption"),
    ],
    ids=["empty", "page", "half", "eps", "tiny", "caption"],
)
def test_what_is_no_picture_is_refused_and_leaves_nothing(server, folder, name, body, reason):
    answer = ask(server, PICTURES, "POST", body, folder="listed/new", name=name)
    assert answer.status_code == 400
    assert reason in answer.json()["error"]
    assert list(folder.iterdir()) == []


def test_a_folder_where_a_file_is_cannot_be_made(server, folder):
    (folder / "file").write_bytes(b"")
    answer = ask(server, PICTURES, "POST", picture(), folder="listed/file", name="a.png")
    assert answer.status_code == 400
    assert "The file system refuses this" in answer.json()["error"]
    assert str(server.base) not in answer.text


def test_captions_belong_to_one_picture(server, folder):
    def write(name: str, text: str) -> int:
        return ask(server, CAPTION, "PUT", text.encode(), folder="listed", name=name).status_code

    for name in ("cat.png", "cat.jpg", "dog.png"):
        (folder / name).write_bytes(picture("JPEG" if name.endswith("jpg") else "PNG"))
    (folder / "dog.caption").write_text("old", encoding="utf-16")
    assert write("dog.png", "  a dög \n") == write("cat.png", "a cat") == write("cat.jpg", "another") == 200
    assert write("bird.png", "none") == write("../listed/dog.png", "none") == 400
    assert write("dog.png", "x" * 70_000) == 400
    answer = ask(server, PICTURES, folder="listed").json()["pictures"]
    assert [file["caption"] for file in answer] == ["another", "a cat", "a dög"]
    texts = {name: text.decode() for name, text in files(folder).items() if not name.endswith((".png", ".jpg"))}
    assert texts == {"cat.png.txt": "a cat\n", "cat.jpg.txt": "another\n", "dog.caption": "a dög\n"}
    assert write("dog.png", "") == 200
    assert ask(server, PICTURES, folder="listed").json()["pictures"][2]["caption"] == ""


def test_a_picture_is_deleted_with_its_own_caption_only(server, folder):
    for name in ("cat.png", "cat.webp", "dog.png"):
        (folder / name).write_bytes(picture())
    for name in ("cat.txt", "dog.txt"):
        (folder / name).write_text("a caption")
    (folder / "deeper").mkdir()

    def delete(name: str):
        return ask(server, PICTURES, "DELETE", folder="listed", name=name)

    assert delete("dog.png").json()["deleted"] == ["dog.png", "dog.txt"]
    assert delete("cat.png").json()["deleted"] == ["cat.png"]
    for name in ("dog.png", "cat.txt", "deeper", "", "*", "../listed/cat.webp"):
        assert delete(name).status_code == 400, name
    assert set(files(folder)) == {"cat.webp", "cat.txt"}


def test_a_missing_parameter_is_named(server, folder):
    for method, route in (("POST", PICTURES), ("DELETE", PICTURES), ("PUT", CAPTION)):
        answer = ask(server, route, method, folder="listed")
        assert (answer.status_code, answer.json()["error"]) == (
            400,
            "The parameter 'name' is missing: add it to the address.",
        )


def bomb(side: int) -> bytes:
    """A small PNG of side x side grey pixels."""
    packer = zlib.compressobj()
    rows = b"".join(packer.compress(bytes(side + 1)) for _ in range(side)) + packer.flush()
    parts = [b"\x89PNG\r\n\x1a\n"]
    for kind, data in ((b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)), (b"IDAT", rows), (b"IEND", b"")):
        parts.append(struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)))
    return b"".join(parts)


def test_bombs_asked_for_at_once_neither_fill_the_memory_nor_stop_the_server(server, folder):
    (folder / "large.png").write_bytes(bomb(11_000))  # 121 million pixels: just allowed
    (folder / "larger.png").write_bytes(bomb(13_000))
    process = psutil.Process(server._process.pid)
    family = [process, *process.children(recursive=True)]
    before = sum(one.memory_info().rss for one in family)
    most, slowest, done = before, 0.0, threading.Event()

    def watch():
        nonlocal most, slowest
        while not done.wait(0.01):
            start = time.monotonic()
            server.http.get(f"{server.url}/queue", timeout=60).raise_for_status()
            slowest = max(slowest, time.monotonic() - start)
            most = max(most, sum(one.memory_info().rss for one in family))

    watcher = threading.Thread(target=watch)
    watcher.start()
    with ThreadPoolExecutor(6) as pool:
        names = ["large.png", "larger.png"] * 3
        answers = list(pool.map(lambda name: ask(server, THUMBNAIL, folder="listed", name=name), names))
    done.set()
    watcher.join()
    assert [answer.status_code for answer in answers] == [200, 400] * 3
    assert "pixels" in answers[1].json()["error"]
    assert most - before < 700 * 2**20
    assert slowest < 2


def test_ten_thousand_pictures_are_listed_while_the_server_answers(server, folder):
    one = picture(size=(8, 8))
    for number in range(10_000):
        (folder / f"{number:05}.png").write_bytes(one)
    with ThreadPoolExecutor(1) as pool:
        start = time.monotonic()
        listed = pool.submit(ask, server, PICTURES, folder="listed")
        slowest = 0.0
        while not listed.done():
            asked = time.monotonic()
            server.http.get(f"{server.url}/queue", timeout=60).raise_for_status()
            slowest = max(slowest, time.monotonic() - asked)
        seconds = time.monotonic() - start
    assert len(listed.result().json()["pictures"]) == 10_000
    assert slowest < 2
    assert seconds < 60


def test_names_of_files_stay_out_of_the_log(server, folder):
    (folder / "secretly broken.png").write_bytes(b"")
    (folder / "a.png").write_bytes(np.random.default_rng(0).bytes(9))
    (folder / "b.png").write_bytes(picture())
    graph = {
        "images": {
            "class_type": "TI_LoadImages",
            "inputs": {"folder": "listed", "path": "", "crop": "square", "size": 64},
        },
        "seen": {"class_type": "PreviewImage", "inputs": {"images": ["images", 0]}},
    }
    left_out = server.run(graph).history["outputs"]["images"]["left_out"]
    assert [file["name"] for file in left_out] == ["a.png", "secretly broken.png"]
    assert "2 of the files" in server.log
    assert "secretly" not in server.log
