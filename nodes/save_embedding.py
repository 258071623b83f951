from comfy_api.latest import io, ui

from ..textual_inversion import formats
from .files import embeddings_folder, file_name
from .sockets import CATEGORY, EmbeddingSocket


class SaveEmbedding(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TI_SaveEmbedding",
            display_name="Save Embedding",
            category=CATEGORY,
            description="Writes models/embeddings/NAME.safetensors; embedding:NAME then works in every prompt.",
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
            ],
            outputs=[io.String.Output(display_name="prompt", tooltip="embedding:NAME, to be put into any prompt.")],
        )

    @classmethod
    def execute(cls, embedding, name, overwrite) -> io.NodeOutput:
        name = file_name(name.strip() or embedding.trigger)
        folder = embeddings_folder()
        path = folder / f"{name}.safetensors" if overwrite else formats.free_path(folder, name)
        formats.write(embedding, path)
        prompt = f"embedding:{path.stem}"
        return io.NodeOutput(prompt, ui=ui.PreviewText(prompt))
