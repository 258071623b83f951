"""A pretended card: ComfyUI's and the pack's own code on tensors of a second device that hold no numbers.

    python -m dev.pretended_card step SD1 "Flux.1 dev"      small models: copies between devices in one step
    python -m dev.pretended_card memory SD1 SDXL            models of full size: bytes of weights and of a step

PyTorch's FakeTensors have shapes, dtypes and a device. Mixing devices or dtypes fails as on a card, memory can be
counted for models of any size, and copies are counted with the place in the code that makes them. Nothing is
computed: where Python reads a number it gets one half, or yes, or zeros. Prints a line of JSON for each family.
"""

import argparse
import collections
import gc
import json
import sys
import tempfile
import threading
import traceback
from collections.abc import Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from benchmarks.full_size import SIZES, Size

from .get_comfyui import comfyui_path
from .in_process import ROOT, comfyui_on_path, import_comfyui, import_pack

_setup_privateuseone_for_python_backend("gpu")
CPU, CARD = torch.device("cpu"), torch.device("gpu", 0)
PLENTY = 2**60
NO_VAE: Any = None  # latents are made up
GIB = 2**30
MODE = FakeTensorMode(allow_non_fake_inputs=True)


# Python reading numbers ---------------------------------------------------------------------------


def _reads_half(plain):
    """``plain`` where there are numbers; else something of the right type."""

    def read(tensor: Tensor) -> Any:
        if not isinstance(tensor, FakeTensor):
            return plain(tensor)
        if tensor.numel() > 1:  # as PyTorch says it, and tokenizers rely on
            raise RuntimeError("Boolean value of Tensor with more than one value is ambiguous")
        COUNTER.note(f"read {tensor.device.type}")
        value = 0.5 if tensor.dtype.is_floating_point else 1
        return bool(value) if plain.__name__ == "__bool__" else value

    return read


class Counter(TorchDispatchMode):
    """Counts copies between devices while it is on."""

    def __init__(self) -> None:
        super().__init__()
        self.found: collections.Counter[str] = collections.Counter()
        self.on = False

    def note(self, what: str) -> None:
        if self.on:
            self.found[f"{what}: {_place()}"] += 1

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.name() in ("aten::_to_copy", "aten::copy_") and isinstance(out, Tensor):
            source = args[0] if func.name() == "aten::_to_copy" else args[1]
            if source.device.type != out.device.type:
                self.note(f"{source.device.type} to {out.device.type}")
        return out


def _place() -> str:
    """The innermost line of ComfyUI or the pack that runs."""
    own = (f"{ROOT}/textual_inversion/", f"{comfyui_path()}/")
    frames = [frame for frame in traceback.extract_stack() if frame.filename.startswith(own)]
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "autograd"


COUNTER = Counter()


class Peak(TorchDispatchMode):
    """Counts the bytes on the card beside the weights while it is on: the most that were there at once."""

    def __init__(self, weights: Sequence[Tensor]) -> None:
        super().__init__()
        self.most = self._now = 0
        self._weights = {weight.untyped_storage()._cdata for weight in weights}
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.device == CARD:
                storage = tensor.untyped_storage()
                if storage._cdata not in self._weights and storage._cdata not in self._alive:
                    self._alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
                    self._now += storage.nbytes()
        if self._now > self.most:
            for number in [number for number, (storage, _) in self._alive.items() if storage.expired()]:
                self._now -= self._alive.pop(number)[1]
            self.most = max(self.most, self._now)
        return out


def _fake(tensor: Any) -> Any:
    return MODE.from_tensor(tensor) if isinstance(tensor, Tensor) and not isinstance(tensor, FakeTensor) else tensor


def _apply(module: nn.Module, change, recurse: bool = True) -> nn.Module:
    """``nn.Module._apply`` with new parameters: the data of a fake one cannot be replaced."""
    for child in module.children() if recurse else ():
        child._apply(change)
    for name, tensor in module._parameters.items():
        if tensor is not None:
            module._parameters[name] = nn.Parameter(change(tensor.detach()), requires_grad=False)
    for name, tensor in module._buffers.items():
        if tensor is not None:
            module._buffers[name] = change(tensor)
    return module


class _Flash(torch.autograd.Function):
    """What attention keeps on a card: its inputs, its output and a number a row, never the whole matrix."""

    @staticmethod
    def forward(ctx, q, k, v):
        out = q.new_empty((*q.shape[:-1], v.shape[-1]))
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx, *gradients):
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


def _attention(q, k, v, *_args, **_options):
    return _Flash.apply(q, k, v)


def pretend(base: Path) -> None:
    """From now on ComfyUI sees a card with memory in plenty, and PyTorch takes fake tensors for real ones."""
    import_pack()
    comfyui_on_path()
    from comfy.cli_args import args

    args.use_pytorch_cross_attention = True  # as on an NVIDIA card
    import_comfyui(base)
    import comfy.model_management as management
    import comfy.ops

    plain_item, plain_tensor, plain_list = Tensor.__getitem__, torch.tensor, Tensor.tolist
    plain_dispatch, lock = FakeTensorMode.__torch_dispatch__, threading.RLock()

    def plenty(_device=None, *more, **and_more):
        return (PLENTY, PLENTY) if more or and_more else PLENTY

    def item(tensor: Tensor, index):
        """PyTorch makes tensors of lists on the device itself."""
        parts = index if isinstance(index, tuple) else (index,)
        parts = tuple(torch.tensor(part, device=tensor.device) if isinstance(part, list) else part for part in parts)
        return plain_item(tensor, parts if isinstance(index, tuple) else parts[0])

    def tolist(tensor: Tensor) -> Any:
        if not isinstance(tensor, FakeTensor):
            return plain_list(tensor)
        tensor.to(CPU)  # PyTorch copies it to read it, and waits for that
        return [0] * len(tensor)

    def tensor(data, *, dtype=None, device=None, **options) -> Tensor:
        made = plain_tensor(data, dtype=dtype, **options)
        return made if device is None else made.to(device)

    def dispatch(mode, func, types, args=(), kwargs=None):
        """One thread at a time, for a backward pass has one for each device, and without numbers that are known:
        PyTorch would compute with them on a device that cannot."""
        with lock:
            out = plain_dispatch(mode, func, types, args, kwargs or {})
        if isinstance(out, FakeTensor):
            out.constant = None
        return out

    readers = {name: _reads_half(getattr(Tensor, name)) for name in ("item", "__bool__", "__float__", "__int__")}
    _replace(management, get_torch_device=lambda: CARD, get_free_memory=plenty, get_total_memory=plenty)
    _replace(comfy.ops, scaled_dot_product_attention=_attention)
    _replace(F, scaled_dot_product_attention=_attention)
    _replace(nn.Module, _apply=_apply)
    _replace(Tensor, tolist=tolist, __getitem__=item, **readers)
    _replace(FakeTensor, tolist=tolist)
    _replace(FakeTensorMode, __torch_dispatch__=dispatch)
    _replace(torch, tensor=tensor, autocast=lambda **_options: nullcontext())  # ComfyUI only switches that off
    _replace(torch.amp, is_autocast_available=lambda _type: False)


def _replace(owner: Any, **functions: Any) -> None:
    for name, function in functions.items():
        setattr(owner, name, function)


@contextmanager
def on_the_card(model, clip):
    """``model`` and ``clip`` with weights without numbers; loaded on the card when they are used."""
    import comfy.model_management

    comfy.model_management.free_memory(2 * PLENTY, CPU)  # text encoders are loaded when they are made
    for patcher in (model, clip.patcher):
        patcher.load_device, patcher.offload_device = CARD, CPU
        for part in patcher.model.modules():
            for store in (part._parameters, part._buffers):
                for name, tensor in store.items():
                    if tensor is not None:
                        fake = _fake(tensor.detach().clone())
                        store[name] = nn.Parameter(fake, requires_grad=False) if store is part._parameters else fake
    with torch.inference_mode(False), MODE:
        yield


def example(model, size: int, rows: int):
    """A batch of pictures of ``size`` pixels, and a concept and per-image tokens to learn from it."""
    from textual_inversion import Embedding, TrainConfig
    from textual_inversion.dataset import make_dataset, training_batches
    from textual_inversion.image_tokens import TrainedTokens

    latents = model._patcher.get_model_object("latent_format")
    side = size // latents.spacial_downscale_ratio
    shape = (latents.latent_channels, *[1] * (latents.latent_dimensions - 2), side, side)
    config = TrainConfig(batch_size=rows)
    with unset_fake_temporarily():
        pictures = [torch.rand(1, 64, 64, 3) for _ in range(4)]
        dataset = make_dataset(lambda images: [torch.zeros(shape) for _ in images], pictures, [], [], config)
        batch = next(training_batches(dataset, config, torch.Generator().manual_seed(0)))

    def token(trigger: str) -> Embedding:
        return Embedding(trigger, {key: torch.zeros(1, width) for key, width in model.keys.items()}).trainable()

    tokens = TrainedTokens(token(config.trigger), tuple(map(token, dataset.image_triggers)))
    latents, noise, quantiles = map(_fake, (batch.latents, batch.noise, batch.quantiles))
    return replace(batch, latents=latents, noise=noise, quantiles=quantiles), tokens


def copies_in_a_step(name: str) -> dict[str, Any]:
    from families import NAMED, build

    from textual_inversion.adapters.comfyui import ComfyModel
    from textual_inversion.gradients import Share, compute_gradients

    family = NAMED[name]
    with torch.inference_mode(False):
        graph = build(family, torch.float16)
    with on_the_card(*graph[:2]):
        ours = ComfyModel(*graph)
        batch, tokens = example(ours, family.size, 4)
        with ours.training() as model:
            COUNTER.found.clear()
            COUNTER.on = True
            with COUNTER:
                compute_gradients(model, Share(tokens, [batch]))
            COUNTER.on = False
    return {"family": name, "copies": dict(COUNTER.found)}


def full_size(name: str, size: Size) -> tuple[Any, Any]:
    """MODEL and CLIP of a family as wide and deep as it is published."""
    import comfy.model_patcher
    import comfy.sd
    from comfy.supported_models_base import ClipTarget
    from families import NAMED

    family = NAMED[name]
    weights, computes = (getattr(torch, kind) for kind in (size.weights, size.computes or size.weights))
    tokenizer_data = family.tokenizer_data()

    def tokenizer(**options):
        with unset_fake_temporarily():  # some are made of the bytes of a tensor
            return family.tokenizer(**options)

    with torch.inference_mode(False), MODE:
        config = family.model({**family.unet, **size.unet, "dtype": weights})
        config.set_inference_dtype(weights, computes if computes != weights else None)
        network = config.get_model({}, "")
        model = comfy.model_patcher.CoreModelPatcher(network, load_device=CPU, offload_device=CPU)
        clip = comfy.sd.CLIP(
            ClipTarget(tokenizer, family.encoder),
            tokenizer_data=tokenizer_data,
            model_options={"dtype": getattr(torch, size.encoder_weights)},
        )
    return model, clip


def memory_of_a_step(name: str, pixels: int | None, rows: int) -> dict[str, Any]:
    """GiB of the weights, and of what a step keeps with nothing, the text encoders, everything checkpointed."""
    from textual_inversion.adapters.comfyui import ComfyModel
    from textual_inversion.gradients import Share, compute_gradients
    from textual_inversion.memory import kept_bytes, step_bytes
    from textual_inversion.objective import batch_loss

    size = SIZES[name]
    pixels, graph = pixels or size.pixels, full_size(size.family or name, size)
    found: dict[str, Any] = {"family": name, "pixels": pixels, "rows": rows}
    with on_the_card(*graph):
        ours = ComfyModel(*graph, vae=NO_VAE)
        batch, tokens = example(ours, pixels, rows)
        with ours.training() as model:
            for part, patcher in (("network", graph[0]), ("encoders", graph[1].patcher)):
                found[part] = sum(weight.nbytes for weight in patcher.model.parameters()) / GIB
            found["estimated"] = step_bytes(model, tokens.embeddings, [batch], rows) / GIB
            for way in ("plain", "encoders checkpointed", "all checkpointed"):
                if way != "plain":
                    assert model.enable_gradient_checkpointing()
                kept = kept_bytes(lambda: batch_loss(model, tokens.embeddings, batch), model.weights())
                found[way] = kept / GIB
            with torch.autograd.set_multithreading_enabled(False), Peak(model.weights()) as peak:
                compute_gradients(model, Share(tokens, [batch]))
            found["peak"] = peak.most / GIB  # in the last way, which keeps little beside the block that it recomputes
    return {name: round(value, 2) if isinstance(value, float) else value for name, value in found.items()}


def table_row(found: dict[str, Any]) -> str:
    weights = f"{found['network']:.1f} + {found['encoders']:.1f}"
    kept = (f"{found[way]:.1f}" for way in ("plain", "encoders checkpointed", "peak"))
    return f"| {found['family']} | {found['pixels']} | {weights} | {' | '.join(kept)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["step", "memory"])
    parser.add_argument("families", nargs="*", help="default: all; names of SIZES for memory")
    parser.add_argument("--pixels", type=int, help="default: what the family was trained on")
    parser.add_argument("--rows", type=int, default=4, help="of a batch")
    parser.add_argument("--markdown", action="store_true", help="memory as a row of the table of docs/models.md")
    args = parser.parse_args()
    sys.path.append(str(ROOT / "tests"))
    with tempfile.TemporaryDirectory(prefix="comfyui-") as base:
        pretend(Path(base))
        from families import NAMED

        for name in args.families or (SIZES if args.what == "memory" else NAMED):
            found = copies_in_a_step(name) if args.what == "step" else memory_of_a_step(name, args.pixels, args.rows)
            print(table_row(found) if args.markdown else json.dumps(found), flush=True)
            gc.collect()


if __name__ == "__main__":
    main()
