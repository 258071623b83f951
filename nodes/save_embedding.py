from comfy_api.latest import io, ui

from ..textual_inversion import formats
from ..textual_inversion.pictures import to_pillow
from .files import embeddings_folder
from .sockets import CATEGORY, EmbeddingSocket


class SaveEmbedding(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TI_SaveEmbedding",
            display_name="Save Embedding",
            category=CATEGORY,
            description="Writes models/embeddings/NAME.safetensors; embedding:NAME then works in every prompt. "
            "What was written is read back and compared.",
            search_aliases=["save textual inversion", "export embedding", "write embedding"],
            is_output_node=True,
            inputs=[
                EmbeddingSocket.Input("embedding", tooltip="From Train Textual Inversion or Load Embedding."),
                io.String.Input("name", default="", tooltip="Name of the file. Empty: the trigger word."),
                io.Boolean.Input(
                    "overwrite",
                    default=False,
                    tooltip="Off: an existing NAME is kept, the new file becomes NAME-2. On: it is replaced, and "
                    "prompts already encoded in this graph do not notice until they change.",
                ),
                io.Combo.Input(
                    "format",
                    options=list(formats.FORMATS),
                    optional=True,
                    tooltip="comfyui: one safetensors file that A1111, Forge, kohya and InvokeAI read too. The others "
                    "are for tools that want their own: a diffusers file (SDXL: two), A1111's pt, "
                    "learned_embeds.bin, or a picture with the embedding inside.",
                ),
                io.Image.Input("picture", optional=True, tooltip="What a png card shows: a preview, for one."),
            ],
            outputs=[io.String.Output(display_name="prompt", tooltip="embedding:NAME, to be put into any prompt.")],
        )

    @classmethod
    def execute(cls, embedding, name, overwrite, format: formats.FormatName = "comfyui", picture=None) -> io.NodeOutput:
        name = formats.file_name(name.strip() or embedding.trigger)
        folder, suffix = embeddings_folder(), formats.FORMATS[format].suffix
        path = folder / f"{name}{suffix}" if overwrite else formats.free_path(folder, name, suffix)
        written = formats.write(embedding, path, format, None if picture is None else to_pillow(picture[-1]))
        if len(written) > 1 or suffix == ".png":  # ComfyUI's own prompts read neither; Load Embedding does
            return io.NodeOutput("", ui=ui.PreviewText(" and ".join(file.name for file in written)))
        prompt = f"embedding:{path.stem}"
        return io.NodeOutput(prompt, ui=ui.PreviewText(prompt))
