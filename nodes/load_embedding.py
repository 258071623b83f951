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
                    tooltip="Trigger word of the embedding to load, if the file contains several. Empty: the only one.",
                ),
            ],
            outputs=[
                EmbeddingSocket.Output(display_name="embedding", tooltip="Connect to Apply Embedding."),
                io.String.Output(
                    display_name="trigger", tooltip="The trigger word from training, or else the file name."
                ),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, file, partner=NO_PARTNER, word=""):
        return [embedding_file(name).stat().st_mtime_ns for name in (file, partner) if name != NO_PARTNER] + [word]

    @classmethod
    def execute(cls, file, partner=NO_PARTNER, word="") -> io.NodeOutput:
        path = embedding_file(file)
        if partner == NO_PARTNER:
            embedding = formats.read(path, word.strip(), known_encoders())
        else:
            embedding = formats.read_pair(path, embedding_file(partner), known_encoders())
        if left_out := embedding.metadata.get("left out"):
            logging.warning("Load Embedding: skipped vectors of %s that cannot be used in a prompt: %s", file, left_out)
        return io.NodeOutput(embedding, embedding.trigger)
