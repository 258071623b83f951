import logging

from comfy_api.latest import io

from ..textual_inversion import formats
from ..textual_inversion.adapters.comfyui_tokens import known_encoders
from .files import embedding_file, embedding_files
from .sockets import CATEGORY, EmbeddingSocket

NO_PARTNER = "none"


class LoadEmbedding(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        files = embedding_files()
        return io.Schema(
            node_id="TI_LoadEmbedding",
            display_name="Load Embedding",
            category=CATEGORY,
            description="Loads a file from models/embeddings, no matter which tool trained it.",
            search_aliases=["load textual inversion", "embedding file", "open embedding"],
            inputs=[
                io.Combo.Input(
                    "file",
                    options=files,
                    tooltip="A file in ComfyUI's embeddings folder: safetensors, pt, bin or a PNG with an embedding.",
                ),
                io.Combo.Input(
                    "partner",
                    options=[NO_PARTNER, *files],
                    optional=True,
                    tooltip="The second file, if diffusers wrote one file for each text encoder of SDXL.",
                ),
                io.String.Input(
                    "word",
                    default="",
                    optional=True,
                    tooltip="Trigger word of the embedding to load, if the file contains several. Empty: all of them.",
                ),
            ],
            outputs=[
                EmbeddingSocket.Output(
                    display_name="embedding", is_output_list=True, tooltip="Connect to Apply Embedding."
                ),
                io.String.Output(
                    display_name="trigger",
                    is_output_list=True,
                    tooltip="The trigger word from training, or else the file name.",
                ),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, file, partner=NO_PARTNER, word=""):
        return [embedding_file(name).stat().st_mtime_ns for name in (file, partner) if name != NO_PARTNER] + [word]

    @classmethod
    def execute(cls, file, partner=NO_PARTNER, word="") -> io.NodeOutput:
        path, word = embedding_file(file), word.strip()
        if partner != NO_PARTNER:
            found = [formats.read_pair(path, embedding_file(partner), known_encoders())]
        elif word:
            found = [formats.read(path, word, known_encoders())]
        else:
            found = formats.read_all(path, known_encoders())
        for embedding in found:
            if left_out := embedding.metadata.get("left out"):
                logging.warning(
                    "Load Embedding: skipped vectors of %s that cannot be used in a prompt: %s", file, left_out
                )
        return io.NodeOutput(found, [embedding.trigger for embedding in found])
