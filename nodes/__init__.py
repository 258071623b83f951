"""The ComfyUI nodes. Each is a schema and a call into the engine."""

from comfy_api.latest import ComfyExtension, io
from typing_extensions import override

from .apply_embedding import ApplyEmbedding
from .blend_embeddings import BlendEmbeddings
from .inspect_embedding import InspectEmbedding
from .live import add_run_routes
from .load_embedding import LoadEmbedding
from .load_images import LoadImages
from .pictures_route import add_picture_routes
from .save_embedding import SaveEmbedding
from .train import Train
from .training_settings import TrainingSettings


class TextualInversionExtension(ComfyExtension):
    @override
    async def on_load(self) -> None:
        add_run_routes()
        add_picture_routes()

    @override
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [
            LoadImages,
            Train,
            TrainingSettings,
            SaveEmbedding,
            LoadEmbedding,
            ApplyEmbedding,
            InspectEmbedding,
            BlendEmbeddings,
        ]
