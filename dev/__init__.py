"""For those who work on this repository: a real ComfyUI, a browser, and the pictures of the docs."""
