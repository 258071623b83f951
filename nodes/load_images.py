from pathlib import Path

import folder_paths
from comfy_api.latest import io

from ..textual_inversion import UserError
from ..textual_inversion.pictures import load_folder
from .pictures_route import input_folder
from .sockets import CATEGORY


class LoadImages(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TI_LoadImages",
            display_name="Load Images (Textual Inversion)",
            category=CATEGORY,
            description="Loads all pictures of a folder, sorted by name, with masks and captions.",
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
                    options=[".", *folder_paths.get_input_subfolders()],
                    tooltip="A folder inside ComfyUI's input folder; '.' is the input folder itself.",
                ),
                io.String.Input(
                    "path",
                    default="",
                    tooltip="Full path of any folder on this computer. If not empty, it is used instead of 'folder'.",
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
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, folder, path, crop, size):
        files = sorted(entry for entry in _folder(folder, path).iterdir() if entry.is_file())
        return [(file.name, file.stat().st_mtime_ns, file.stat().st_size) for file in files]

    @classmethod
    def execute(cls, folder, path, crop, size) -> io.NodeOutput:
        images, masks, captions = load_folder(_folder(folder, path), size, crop == "square")
        return io.NodeOutput(images, masks, captions)


def _folder(folder: str, path: str) -> Path:
    if not path.strip():
        return input_folder(folder)
    chosen = Path(path.strip()).expanduser()
    if not chosen.is_absolute():
        raise UserError(f"{path!r} is not a full path: enter one, or use 'folder' for ComfyUI's input folder.")
    if not chosen.is_dir():
        raise UserError(f"The folder {chosen} does not exist: choose another one.")
    return chosen
