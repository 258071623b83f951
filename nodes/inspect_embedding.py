from dataclasses import replace

from comfy_api.latest import io, ui

from ..textual_inversion.adapters.comfyui_tokens import embedding_keys, vocabularies
from ..textual_inversion.inspection import describe, inspect
from .embedding_chart import chart
from .sockets import CATEGORY, EmbeddingSocket


class InspectEmbedding(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TI_InspectEmbedding",
            display_name="Inspect Embedding",
            category=CATEGORY,
            description="Shows what is in an embedding: the length of its vectors and where it comes from. With a CLIP "
            "also the usual length of a word and the nearest words.",
            search_aliases=[
                "textual inversion info",
                "embedding info",
                "nearest words",
                "vector length",
                "embedding metadata",
                "ti inspect",
            ],
            is_output_node=True,
            inputs=[
                EmbeddingSocket.Input(
                    "embedding", tooltip="From Train Textual Inversion, Load Embedding or Blend Embeddings."
                ),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip="The text encoder of the same model, to compare every vector with the words it knows. "
                    "Not connected: only the lengths.",
                ),
            ],
            outputs=[
                io.String.Output(display_name="text", tooltip="The text that the node shows."),
                io.Image.Output(
                    display_name="picture",
                    tooltip="Bar chart of the vector lengths, compared with ordinary words, and the nearest words.",
                ),
            ],
        )

    @classmethod
    def execute(cls, embedding, clip=None) -> io.NodeOutput:
        known = {}
        if clip is not None:
            known, read = vocabularies(clip), embedding.for_encoders(embedding_keys(clip), False).vectors
            unread = {key: rows for key, rows in embedding.vectors.items() if all(rows is not r for r in read.values())}
            embedding = replace(embedding, vectors={**read, **unread})
        found = inspect(embedding, known)
        text = describe(embedding, found)
        picture = chart(embedding, found)
        shown = {**ui.PreviewText(text).as_dict(), **ui.PreviewImage(picture).as_dict()}
        return io.NodeOutput(text, picture, ui=shown)
