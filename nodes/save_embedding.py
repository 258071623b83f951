from dataclasses import dataclass
from pathlib import Path
from typing import Any

from comfy_api.latest import io
from PIL import Image
from torch import Tensor

from ..textual_inversion import Embedding, UserError, formats
from ..textual_inversion.pictures import to_pillow
from .files import check_overwrite, embeddings_folder, is_taken
from .sockets import CATEGORY, EmbeddingSocket


class SaveEmbedding(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TI_SaveEmbedding",
            display_name="Save Embedding",
            category=CATEGORY,
            description="Saves models/embeddings/NAME.safetensors; embedding:NAME then works in every prompt. "
            "The file is read back and checked.",
            search_aliases=["save textual inversion", "export embedding", "write embedding"],
            is_input_list=True,
            is_output_node=True,
            inputs=[
                EmbeddingSocket.Input("embedding", tooltip="From Train Textual Inversion or Load Embedding."),
                io.String.Input("name", default="", tooltip="File name. Empty: the trigger word."),
                io.Boolean.Input(
                    "overwrite",
                    default=False,
                    tooltip="Off: keep an existing NAME and save the new file as NAME-2. On: replace it. Prompts that "
                    "were already encoded in this workflow use the old file until you edit them.",
                ),
                io.Combo.Input(
                    "format",
                    options=list(formats.FORMATS),
                    optional=True,
                    tooltip="comfyui: one safetensors file, which A1111, Forge, kohya and InvokeAI also read. The "
                    "others are for tools that need their own format: a diffusers file (SDXL: two), A1111's pt, "
                    "learned_embeds.bin, or a picture that contains the embedding.",
                ),
                io.Image.Input(
                    "picture",
                    optional=True,
                    tooltip="Such as the previews of Train. The last one becomes the thumbnail of the file, or the "
                    "picture of a PNG card.",
                ),
            ],
            outputs=[
                io.String.Output(
                    display_name="prompt", is_output_list=True, tooltip="embedding:NAME, for use in any prompt."
                )
            ],
        )

    @classmethod
    def validate_inputs(cls, name) -> bool | str:
        """Says before training what is wrong with a name; one that is connected is checked later."""
        try:
            for one in name:
                formats.file_name((one or "").strip() or "embedding")
        except UserError as error:
            return str(error)
        return True

    @classmethod
    def execute(cls, embedding, name, overwrite, format=("comfyui",), picture=(None,)) -> io.NodeOutput:
        """Several embeddings are saved one by one; of the other inputs the last value serves those that are left."""
        if len(embedding) == 1:
            picture = picture[-1:]  # of many, the last one is its thumbnail
        inputs: list[Any] = [embedding, name, overwrite, format, picture]
        count = max(map(len, inputs))
        orders = [_Order(*(values[min(number, len(values) - 1)] for values in inputs)) for number in range(count)]
        names = [order.file_name.casefold() for order in orders if order.overwrite]
        if twice := [one for one in names if names.count(one) > 1]:
            raise UserError(
                f"{len(twice)} embeddings would replace one another as {twice[0]!r}: leave 'name' empty, which takes "
                "the trigger words, or turn 'overwrite' off."
            )
        saved = [_save(order) for order in orders]
        return io.NodeOutput([prompt for prompt, _ in saved], ui={"text": [line for _, told in saved for line in told]})


@dataclass(frozen=True)
class _Order:
    """One file to write."""

    embedding: Embedding
    name: str
    overwrite: bool
    format: formats.FormatName
    picture: Tensor | None
    """(pictures, H, W, 3)"""

    @property
    def file_name(self) -> str:
        return formats.file_name(self.name.strip() or self.embedding.trigger)


def _save(order: _Order) -> tuple[str, list[str]]:
    """Writes a file; returns how prompts name it, or nothing if they cannot, and what there is to tell."""
    folder, chosen = embeddings_folder(), formats.FORMATS[order.format]
    embedding, format = order.embedding, order.format
    shown = None if order.picture is None else to_pillow(order.picture[-1])
    try:
        written = _write(order, folder, shown)
    except OSError as error:
        raise UserError(
            f"{order.file_name!r} cannot be written to the embeddings folder ({error.strerror or error}): make room "
            "there, change its rights, or choose another name."
        ) from error
    names = [file.relative_to(folder).as_posix() for file in written]
    prompt, text = f"embedding:{names[0].removesuffix(chosen.suffix)}", ""
    if len(written) > 1 or not chosen.stock_reads_it:  # Load Embedding reads them
        prompt, text = "", " and ".join(names)
    told = [text or prompt, formats.prompt_hint(embedding, format)]
    if prompt:
        told.append(f"Saved {names[0]} in the embeddings folder. Write {prompt} in prompts for the same model family.")
        if shown:
            told.append(_save_thumbnail(written[0], shown))
    return prompt, [line for line in told if line]


def _write(order: _Order, folder: Path, picture: Image.Image | None) -> list[Path]:
    embedding, name, format, chosen = order.embedding, order.file_name, order.format, formats.FORMATS[order.format]
    if not order.overwrite:
        return formats.write_new(embedding, folder, name, format, picture, is_taken)
    path = folder / f"{name}{chosen.suffix}"
    if chosen.stock_reads_it:
        check_overwrite(path, name)
    return formats.write(embedding, path, format, picture)


def _save_thumbnail(file: Path, picture: Image.Image) -> str:
    """Writes NAME.preview.png, where ComfyUI's model library, A1111 and LoRA managers look, and says so or why not."""
    path = file.with_name(f"{file.stem}.preview.png")
    try:
        picture.save(path)
    except OSError as error:
        return f"No thumbnail: {error.strerror or error}."
    return f"Its thumbnail is {path.name}."
