"""Textual Inversion for ComfyUI: teach the loaded model a new word from a few pictures."""

WEB_DIRECTORY = "./web"


OLDEST_COMFYUI = "0.30.0"


async def comfy_entrypoint():
    """ComfyUI's hook: imported here, so that importing this package alone needs no ComfyUI.

    Raises ImportError, which ComfyUI shows at its start, where ComfyUI is too old.
    """
    from comfyui_version import __version__ as comfyui
    from packaging.version import Version

    if Version(comfyui) < Version(OLDEST_COMFYUI):
        raise ImportError(f"Textual Inversion needs ComfyUI {OLDEST_COMFYUI} or newer, this is {comfyui}: update it.")
    from .nodes import TextualInversionExtension

    return TextualInversionExtension()
