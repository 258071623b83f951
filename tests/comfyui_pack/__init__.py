"""A custom-node pack for the tests: SD1 and SDXL at small width, and nodes that look inside.

Loaded by the real server, and imported by tests that use ComfyUI's classes in process.
"""

import copy
import hashlib

import comfy.model_base
import comfy.sd
import comfy.sd1_clip
import comfy.sdxl_clip
import comfy.supported_models
import comfy.supported_models_base
import comfy.text_encoders.flux
import folder_paths
import torch
from comfy_api.latest import ComfyExtension, io

WIDTH, WIDTH_G = 32, 48


def _clip_config(width: int, act: str) -> dict:
    return {
        "num_hidden_layers": 3,
        "hidden_size": width,
        "num_attention_heads": 4,
        "intermediate_size": 2 * width,
        "hidden_act": act,
        "max_position_embeddings": 77,
        "eos_token_id": 49407,
    }


class SmallTokenizer(comfy.sd1_clip.SDTokenizer):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, embedding_size=WIDTH, **kwargs)


class SmallTokenizerG(comfy.sd1_clip.SDTokenizer):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, pad_with_end=False, embedding_size=WIDTH_G, embedding_key="clip_g", **kwargs)


class SmallSD1Tokenizer(comfy.sd1_clip.SD1Tokenizer):
    def __init__(self, embedding_directory=None, tokenizer_data={}):
        super().__init__(embedding_directory, tokenizer_data, tokenizer=SmallTokenizer)


class SmallSDXLTokenizer(comfy.sdxl_clip.SDXLTokenizer):
    def __init__(self, embedding_directory=None, tokenizer_data={}):
        self.clip_l = SmallTokenizer(embedding_directory=embedding_directory, tokenizer_data=tokenizer_data)
        self.clip_g = SmallTokenizerG(embedding_directory=embedding_directory, tokenizer_data=tokenizer_data)


class SmallClipL(comfy.sd1_clip.SDClipModel):
    def __init__(self, device="cpu", dtype=None, model_options={}):
        config = _clip_config(WIDTH, "quick_gelu")
        super().__init__(
            device,
            return_projected_pooled=False,
            dtype=dtype,
            textmodel_json_config=config,
            model_options=model_options,
        )


class SmallSD1Clip(comfy.sd1_clip.SD1ClipModel):
    def __init__(self, device="cpu", dtype=None, model_options={}):
        # As ComfyUI's own models do, whatever the default says.
        super().__init__(device, dtype, model_options, clip_model=SmallClipL)  # pyright: ignore[reportArgumentType]


class SmallSDXLClip(comfy.sdxl_clip.SDXLClipModel):
    """SDXL's own encode path (penultimate layers, true pooled output) over two small encoders."""

    def __init__(self, device="cpu", dtype=None, model_options={}):
        torch.nn.Module.__init__(self)
        hidden = {"layer": "hidden", "layer_idx": -2, "layer_norm_hidden_state": False}
        common = {"device": device, "dtype": dtype, "model_options": model_options, **hidden}
        self.clip_l = comfy.sd1_clip.SDClipModel(textmodel_json_config=_clip_config(WIDTH, "quick_gelu"), **common)
        self.clip_g = comfy.sd1_clip.SDClipModel(
            textmodel_json_config=_clip_config(WIDTH_G, "gelu"),
            special_tokens={"start": 49406, "end": 49407, "pad": 0},
            **common,
        )
        self.dtypes = {dtype}

    def load_sd(self, sd):
        encoder = self.clip_g if sd["text_model.final_layer_norm.weight"].shape[0] == WIDTH_G else self.clip_l
        return encoder.load_sd(sd)


class SmallSD1(comfy.supported_models.SD15):
    unet_config = {**comfy.supported_models.SD15.unet_config, "context_dim": WIDTH, "model_channels": 32}
    unet_extra_config = {"num_heads": 4, "num_head_channels": -1}

    def clip_target(self, state_dict={}):
        return comfy.supported_models_base.ClipTarget(SmallSD1Tokenizer, SmallSD1Clip)


class SmallSDXL(comfy.supported_models.SDXL):
    unet_config = {
        **comfy.supported_models.SDXL.unet_config,
        "model_channels": 32,
        "transformer_depth": [0, 2],
        "context_dim": WIDTH + WIDTH_G,
        "adm_in_channels": WIDTH_G + 6 * 256,
    }

    def process_clip_state_dict(self, state_dict):
        """The small encoders are stored in ComfyUI's own naming, not open_clip's."""
        prefix = "conditioner."
        return {key[len(prefix) :]: value for key, value in state_dict.items() if key.startswith(prefix)}

    def process_clip_state_dict_for_saving(self, state_dict):
        return {f"conditioner.{key}": value for key, value in state_dict.items()}

    def clip_target(self, state_dict={}):
        return comfy.supported_models_base.ClipTarget(SmallSDXLTokenizer, SmallSDXLClip)


for _model in (SmallSD1, SmallSDXL):
    if not any(known.__name__ == _model.__name__ for known in comfy.supported_models.models):
        comfy.supported_models.models.append(_model)


def weights_hash(*modules: torch.nn.Module) -> str:
    """SHA-256 over every parameter and buffer, by name."""
    digest = hashlib.sha256()
    for module in modules:
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class HashWeights(io.ComfyNode):
    """Shows the hash of MODEL, CLIP and VAE; never cached."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TIT_HashWeights",
            is_output_node=True,
            inputs=[io.Model.Input("model"), io.Clip.Input("clip"), io.Vae.Input("vae")],
        )

    @classmethod
    def fingerprint_inputs(cls, **_inputs):
        return float("nan")

    @classmethod
    def execute(cls, model, clip, vae):
        digest = weights_hash(model.model, clip.cond_stage_model, vae.first_stage_model)
        return io.NodeOutput(ui={"hash": [digest]})


class FailingModel(io.ComfyNode):
    """A MODEL whose attention raises an error after a number of calls."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TIT_FailingModel",
            inputs=[
                io.Model.Input("model"),
                io.Int.Input("calls", default=100),
                io.String.Input("error", default="the test's model fails here"),
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(cls, model, calls, error):
        left = [calls]

        def count_down(q, k, v, extra_options):
            left[0] -= 1
            if left[0] < 0:
                raise RuntimeError(error)
            return q, k, v

        model = model.clone()
        model.set_model_attn2_patch(count_down)
        return io.NodeOutput(model)


class FailingVae(io.ComfyNode):
    """A VAE that raises an error where it should decode, or encode."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TIT_FailingVae",
            inputs=[
                io.Vae.Input("vae"),
                io.String.Input("error", default="the test's VAE fails here"),
                io.Combo.Input("where", options=["decode", "encode"]),
            ],
            outputs=[io.Vae.Output()],
        )

    @classmethod
    def execute(cls, vae, error, where):
        vae = copy.copy(vae)

        def fail(*_args, **_kwargs):
            raise RuntimeError(error)

        setattr(vae, where, fail)
        return io.NodeOutput(vae)


class Twice(io.ComfyNode):
    """A list of the same value twice."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TIT_Twice",
            inputs=[io.AnyType.Input("value")],
            outputs=[io.AnyType.Output(is_output_list=True)],
        )

    @classmethod
    def execute(cls, value):
        return io.NodeOutput([value, value])


class List(io.ComfyNode):
    """A list of whatever it is given."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TIT_List",
            inputs=[io.AnyType.Input("values")],
            outputs=[io.String.Output(is_output_list=True)],
        )

    @classmethod
    def execute(cls, values):
        return io.NodeOutput(values)


class FluxClip(io.ComfyNode):
    """Flux's text encoders, small: ComfyUI's loaders know text encoders by their full width."""

    @classmethod
    def define_schema(cls):
        return io.Schema(node_id="TIT_FluxClip", outputs=[io.Clip.Output()])

    @classmethod
    def execute(cls):
        target = comfy.supported_models_base.ClipTarget(
            comfy.text_encoders.flux.FluxTokenizer, comfy.text_encoders.flux.flux_clip()
        )
        t5 = {"d_ff": 64, "d_kv": 16, "d_model": 64, "num_heads": 4, "num_layers": 2}
        options = {"clip_l_model_config": _clip_config(WIDTH, "quick_gelu"), "t5xxl_model_config": t5}
        clip = comfy.sd.CLIP(target, folder_paths.get_folder_paths("embeddings"), model_options=options)
        generator = torch.Generator().manual_seed(0)
        for parameter in clip.cond_stage_model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1 + (parameter.ndim == 1))
        return io.NodeOutput(clip)


class TestNodes(ComfyExtension):
    async def get_node_list(self):
        return [HashWeights, FailingModel, FailingVae, Twice, List, FluxClip]


async def comfy_entrypoint():
    return TestNodes()
