from pathlib import Path

import folder_paths
from comfy_api.latest import io

from ..textual_inversion import formats
from .sockets import CATEGORY, EmbeddingSocket


class LoadEmbedding(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        files = [name for name in folder_paths.get_filename_list("embeddings") if name.endswith(".safetensors")]
        return io.Schema(
            node_id="TI_LoadEmbedding",
            display_name="Load Embedding",
            category=CATEGORY,
            description="Reads a file of models/embeddings, ours or somebody else's.",
            search_aliases=["load textual inversion", "embedding file", "open embedding"],
            inputs=[
                io.Combo.Input("file", options=files, tooltip="A .safetensors file in ComfyUI's embeddings folder."),
            ],
            outputs=[
                EmbeddingSocket.Output(display_name="embedding", tooltip="Connect to Apply Embedding."),
                io.String.Output(display_name="trigger", tooltip="The word it was trained with, else its file name."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, file):
        return Path(folder_paths.get_full_path_or_raise("embeddings", file)).stat().st_mtime_ns

    @classmethod
    def execute(cls, file) -> io.NodeOutput:
        embedding = formats.read(Path(folder_paths.get_full_path_or_raise("embeddings", file)))
        return io.NodeOutput(embedding, embedding.trigger)
