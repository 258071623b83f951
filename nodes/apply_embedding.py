import logging
from collections.abc import Sequence
from typing import Any

from comfy.sd import CLIP
from comfy_api.latest import io, ui

from ..textual_inversion import Embedding, UserError
from ..textual_inversion.adapters.comfyui_tokens import embedding_keys, known_as, with_embeddings
from ..textual_inversion.errors import listed
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
            is_input_list=True,
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
                    display_name="clip",
                    is_output_list=True,
                    tooltip="Connect to CLIP Text Encode, or to another Apply Embedding.",
                )
            ],
        )

    @classmethod
    def execute(
        cls, clip: Sequence[CLIP], embedding: Sequence[Embedding], trigger: Sequence[str], strength: Sequence[float]
    ) -> io.NodeOutput:
        """All embeddings go into one CLIP. Of the other inputs, several values give several, as in any node."""
        if len(embedding) > 1 and any(word.strip() for word in trigger):
            words = listed(learned.trigger for learned in embedding)
            raise UserError(f"'trigger' renames one embedding, but {words} are connected: leave it empty.")
        inputs: list[Any] = [clip, trigger, strength]
        applied, told = [], []
        for run in range(max(map(len, inputs))):
            known, word, factor = (values[min(run, len(values) - 1)] for values in inputs)
            for learned in embedding:
                known, said = _apply(known, learned, word.strip(), factor)
                told += said
            applied.append(known)
        said = " ".join(dict.fromkeys(told))
        if said:
            logging.info("Apply Embedding: %s", said)
        return io.NodeOutput(applied, ui=ui.PreviewText(said))  # an empty one clears what it said before


def _apply(clip: CLIP, embedding: Embedding, trigger: str, strength: float) -> tuple[CLIP, list[str]]:
    """The CLIP with the embedding, and what there is to tell."""
    trigger = trigger or embedding.trigger
    if trigger != embedding.trigger:  # the rules are for new words: a file may have any name
        check_trigger(trigger)
    embedding = embedding.renamed(trigger)
    replaced = known_as(clip, trigger)
    told = [f"Replaces the {replaced!r} from before." if replaced else "", embedding.partly(embedding_keys(clip))]
    return with_embeddings(clip, embedding.scaled(strength)), list(filter(None, told))
