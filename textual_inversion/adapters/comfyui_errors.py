"""What an error of the first pass through a model says: the wiring, or the node or patch that raised it."""

import re
import sysconfig
import traceback
from pathlib import Path

import comfy
import torch

from ..errors import TrainingError, UserError

COMFY = Path(comfy.__path__[0])
OURS = Path(__file__).parent.parent
# Patches use ComfyUI's layers and its attention too: these, and what is around them, do not tell who has called.
LAYERS = [COMFY / "ops.py", COMFY / "ldm/modules/attention.py"]
BETWEEN = [Path(torch.__file__).parent.parent, Path(sysconfig.get_path("stdlib")), OURS, *LAYERS]
# How PyTorch and ComfyUI say that a text encoder's output has not the shape the network takes, or is missing.
SHAPES = re.compile(
    r"shapes?\b|\bsizes?\b|dimension|\bdim\b|channels|be multiplied|NoneType|\d required positional|unexpected keyword",
    re.IGNORECASE,
)


def explained(error: Exception) -> UserError | TrainingError:
    """The sentence for the user about an error of the first pass through text encoders and network."""
    text = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no text'}"
    where = origin(error)
    if where:
        return TrainingError(f"{where} fails before the first step: {text} Leave that node out, or report it there.")
    if SHAPES.search(str(error)) or isinstance(error, AssertionError):
        return UserError(
            "CLIP and MODEL do not belong together: connect both from the same Load Checkpoint, or the "
            f"text encoder made for this model. ({text})"
        )
    return TrainingError(f"The model fails before the first step: {text}")


def origin(error: Exception) -> str:
    """The function and the pack or file that raised ``error``; empty where it was ComfyUI's own models."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        path = Path(frame.filename)
        if path.is_relative_to(COMFY) and path not in LAYERS:
            return ""
        if path.is_file() and not any(path.is_relative_to(folder) for folder in BETWEEN):
            return f"{frame.name} of {_pack(path)}"
    return ""


def _pack(path: Path) -> str:
    """The pack that a file belongs to, or the last two parts of its path."""
    parts = path.parts
    if "custom_nodes" in parts[:-1]:
        return parts[parts.index("custom_nodes") + 1]
    return "/".join(parts[-2:])
