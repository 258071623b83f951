"""Textual Inversion for ComfyUI: teach the loaded model a new word from a few pictures."""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    """ComfyUI's hook: imported here, so that importing this package alone needs no ComfyUI."""
    from .nodes import TextualInversionExtension

    return TextualInversionExtension()
