from comfy_api.latest import io

from ..textual_inversion import UserError
from ..textual_inversion.blend import MODES, blend, take
from ..textual_inversion.prompts import check_trigger
from .sockets import CATEGORY, EmbeddingSocket


class BlendEmbeddings(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TI_BlendEmbeddings",
            display_name="Blend Embeddings",
            category=CATEGORY,
            description="Makes one embedding out of two: a mix, the difference, or one after the other. Can also keep "
            "only some vectors of one embedding.",
            search_aliases=[
                "textual inversion blend",
                "merge embeddings",
                "mix embeddings",
                "slerp",
                "interpolate",
                "combine textual inversion",
            ],
            inputs=[
                EmbeddingSocket.Input("a", tooltip="From Train Textual Inversion or Load Embedding."),
                EmbeddingSocket.Input(
                    "b",
                    optional=True,
                    tooltip="A second embedding for the same model. Not connected: select vectors of a, or rename a.",
                ),
                io.Combo.Input(
                    "mode",
                    options=list(MODES),
                    tooltip="weighted sum: straight line from a to b. slerp: rotates from a to b and keeps the length "
                    "of the vectors. difference: a - weight x b. join: the vectors of a, then those of b.",
                ),
                io.Float.Input(
                    "weight",
                    default=0.5,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    round=0.001,
                    tooltip="0: a. 1: b. For difference: how much of b to subtract. Not used by join.",
                ),
                io.String.Input(
                    "vectors",
                    default="",
                    tooltip="Vectors of the result to keep, by number: '1-3, 5' keeps these in this order, '-2' drops "
                    "the second, '-2-4' drops three. Empty: all.",
                ),
                io.String.Input("trigger", default="", tooltip="Trigger word of the result. Empty: that of a."),
            ],
            outputs=[
                EmbeddingSocket.Output(
                    display_name="embedding",
                    tooltip="Connect to Apply Embedding, Save Embedding, Inspect Embedding or another "
                    "Blend Embeddings.",
                )
            ],
        )

    @classmethod
    def execute(cls, a, mode, weight, vectors, trigger, b=None) -> io.NodeOutput:
        trigger, numbers = trigger.strip(), vectors.strip()
        if b is None and not (trigger or numbers):
            raise UserError("Connect b, or enter which vectors of a to keep, or a new trigger word.")
        result = a if b is None else blend(a, b, mode, weight)
        if numbers:
            result = take(result, numbers)
        if trigger:
            check_trigger(trigger)
            result = result.renamed(trigger)
        return io.NodeOutput(result)
