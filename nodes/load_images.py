from collections.abc import MutableMapping
from contextlib import suppress
from pathlib import Path

import folder_paths
from comfy_api.latest import io
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ..textual_inversion import UserError
from ..textual_inversion.concept_folders import concepts_inside, load_concepts
from ..textual_inversion.pictures import LeftOut, is_hidden
from .picture_folders import chosen_folder, roots
from .sockets import CATEGORY

# Files of a folder that are not used, by its first picture: for Train's report.
LEFT_OUT: MutableMapping[Tensor, list[LeftOut]] = WeakTensorKeyDictionary()

Files = list[tuple[str, int, int]]  # path, time of the last change, size
# By node: the folders it has read, as they were, and how often one of them was found changed.
USED: dict[str, dict[Path, Files]] = {}
CHANGES: dict[str, int] = {}


class LoadImages(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TI_LoadImages",
            display_name="Load Images (Textual Inversion)",
            category=CATEGORY,
            description="Loads all pictures of a folder, sorted by name, with masks and captions. In a folder of "
            "folders each is a concept of its own.",
            search_aliases=[
                "load images",
                "image folder",
                "dataset",
                "load batch",
                "training images",
                "captions",
            ],
            inputs=[
                io.Combo.Input(
                    "folder",
                    options=[*folder_paths.get_input_subfolders(), "."],
                    default="",
                    tooltip="A folder inside ComfyUI's input folder; '.' is the input folder itself. Adding pictures "
                    "makes a folder where none is chosen.",
                ),
                io.String.Input(
                    "path",
                    default="",
                    tooltip="Full path of a folder in ComfyUI's input, output or temp folder, or in one that the owner "
                    "of the server allows. If not empty, it is used instead of 'folder'.",
                ),
                io.Combo.Input(
                    "crop",
                    options=["keep shape", "square"],
                    tooltip="square: crop to a square in the middle. keep shape: crop less than 8 pixels.",
                ),
                io.Int.Input(
                    "size",
                    default=512,
                    min=0,
                    max=4096,
                    step=8,
                    tooltip="Pixels per side. With keep shape: the side of a square of the same area. 0: do not "
                    "resize. Use 512 for SD1, 1024 for SDXL.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="images", is_output_list=True, tooltip="The pictures, one by one."),
                io.Mask.Output(
                    display_name="masks",
                    is_output_list=True,
                    tooltip="White where the picture is opaque. All white if nothing is transparent.",
                ),
                io.String.Output(
                    display_name="captions",
                    is_output_list=True,
                    tooltip="Text of NAME.txt next to NAME.png. Empty if there is no such file.",
                ),
                io.String.Output(
                    display_name="concepts",
                    is_output_list=True,
                    tooltip="A trigger word for each picture, made of its folder's name: <cat> of cat. Connect it to "
                    "'trigger' of Train to learn every folder in a folder.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, folder) -> bool | str:
        """Takes over from ComfyUI, which would refuse a folder that was made or removed since it looked."""
        return True if folder is None or isinstance(folder, str) else "'folder' must be a name: choose one."

    @classmethod
    def fingerprint_inputs(cls, folder, path, crop, size):
        if folder is not None and path is not None:
            return _files_in(chosen_folder(folder, path))
        # One of them is connected, and ComfyUI does not say to what: whether anything changed where this node has been.
        node = cls.hidden.unique_id
        before = USED.setdefault(node, {})
        USED[node] = {place: _files_in(place) for place in before}
        CHANGES[node] = CHANGES.get(node, 0) + (USED[node] != before)
        return CHANGES[node]

    @classmethod
    def execute(cls, folder, path, crop, size) -> io.NodeOutput:
        place = chosen_folder(folder, path)
        files = _files_in(place)
        if place is None or not files:
            raise UserError(
                "Load Images has no pictures: press 'Add pictures' in it, or choose a folder with pictures."
            )
        if cls.hidden and cls.hidden.unique_id in USED:
            USED[cls.hidden.unique_id][place] = files
        loaded, triggers = load_concepts(place, size, crop == "square", roots())
        LEFT_OUT[loaded.images[0]] = loaded.left_out
        left_out = [file._asdict() for file in loaded.left_out]
        outputs = loaded.images, loaded.masks, loaded.captions, triggers
        return io.NodeOutput(*outputs, ui={"left_out": left_out})


def _files_in(folder: Path | None) -> Files:
    """The files that are read from a folder, as they are now: another answer means that something changed."""
    if folder is None or not folder.is_dir():
        return []
    files: list[Path] = []
    for one in [folder, *concepts_inside(folder, roots())]:  # of other folders inside nothing is read
        with suppress(OSError):  # one that must not be read is left out
            files += sorted(entry for entry in one.iterdir() if entry.is_file() and not is_hidden(entry.name))
    return [(str(file), file.stat().st_mtime_ns, file.stat().st_size) for file in files]
