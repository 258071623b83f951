"""The training engine: torch only, it knows neither ComfyUI nor diffusers."""

__version__ = "0.2.0"

from .config import PreviewConfig, TrainConfig
from .embedding import Embedding
from .errors import TrainingError, TrainingStopped, UserError
from .training import Step, train
from .vocabulary import initial_embedding

__all__ = [
    "Embedding",
    "PreviewConfig",
    "Step",
    "TrainConfig",
    "TrainingError",
    "TrainingStopped",
    "UserError",
    "__version__",
    "initial_embedding",
    "train",
]
