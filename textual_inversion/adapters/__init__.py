"""How the engine sees a model. Only modules in here import ComfyUI or diffusers."""
