import logging

from comfy_api.latest import io, ui

from ..textual_inversion.adapters.comfyui_tokens import embedding_keys, known_as, with_embeddings
from ..textual_inversion.prompts import check_trigger
from .sockets import CATEGORY, EmbeddingSocket


class ApplyEmbedding(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TI_ApplyEmbedding",
            display_name="Apply Embedding",
            category=CATEGORY,
            description="Adds an embedding to a CLIP: write its trigger word anywhere in a prompt. No file is needed.",
            search_aliases=["textual inversion", "use embedding", "trigger word", "ti apply"],
            inputs=[
                io.Clip.Input("clip", tooltip="The text encoder. Only the output knows the trigger word."),
                EmbeddingSocket.Input("embedding", tooltip="From Train Textual Inversion or Load Embedding."),
                io.String.Input(
                    "trigger",
                    default="",
                    tooltip="Trigger word to write in prompts. Empty: the one the embedding was trained with.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=-2.0,
                    max=2.0,
                    step=0.05,
                    round=0.001,
                    tooltip="Multiplies the vectors. 1: as trained. To change only one prompt, write (word:1.2) in it.",
                ),
            ],
            outputs=[
                io.Clip.Output(
                    display_name="clip", tooltip="Connect to CLIP Text Encode, or to another Apply Embedding."
                )
            ],
        )

    @classmethod
    def execute(cls, clip, embedding, trigger, strength) -> io.NodeOutput:
        trigger = trigger.strip() or embedding.trigger
        if trigger != embedding.trigger:  # the rules are for new words: a file may have any name
            check_trigger(trigger)
        embedding = embedding.renamed(trigger)
        replaced = known_as(clip, trigger)
        told = [f"Replaces the {replaced!r} from before." if replaced else "", embedding.partly(embedding_keys(clip))]
        said = " ".join(filter(None, told))
        if said:
            logging.info("Apply Embedding: %s", said)
        applied = with_embeddings(clip, embedding.scaled(strength))
        return io.NodeOutput(applied, ui=ui.PreviewText(said)) if said else io.NodeOutput(applied)
