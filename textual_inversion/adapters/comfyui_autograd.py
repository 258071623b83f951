"""Makes ComfyUI's modules differentiable for a while, without copying a weight.

Each context changes objects of one module and puts them back when it ends.
"""

import functools
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any
from weakref import WeakSet, WeakValueDictionary

import comfy.model_management
import comfy.ops
import comfy.quant_ops
import comfy_kitchen.backends.eager.rope
import torch
from comfy.weight_adapter.bypass import BypassForwardHook
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import noop_context_fn

from ..memory import checkpointed


@contextmanager
def ordinary_weights(module: nn.Module) -> Iterator[None]:
    """Weights loaded under inference mode cannot be saved for backward; a view of the same memory can.

    ComfyUI runs every node under ``torch.inference_mode``. What was made there has no version counter, not even
    after ``parameter.data = ...`` has moved it to another device; and what was moved there is an inference tensor,
    wherever it was made. On leaving, the module has its own tensors back.
    """
    # Object patches of ComfyUI's ModelPatcher do not do: they go in before the weights are loaded and patched.
    replaced: list[tuple[dict[str, Any], str, Tensor]] = []
    try:
        for part in module.modules():
            for store in (part._parameters, part._buffers):
                for name, tensor in store.items():
                    if tensor is not None and not _can_be_saved(tensor):
                        replaced.append((store, name, tensor))
                        store[name] = _ordinary(tensor)  # type: ignore[assignment]
        yield
    finally:
        for store, name, tensor in replaced:
            store[name] = tensor


def _can_be_saved(tensor: Tensor) -> bool:
    """Whether autograd takes the tensor for the backward pass, and can tell if it was changed since then."""
    if is_traceable_wrapper_subclass(tensor):
        return all(_can_be_saved(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    try:
        return not tensor.is_inference() and tensor._version >= 0
    except RuntimeError:  # "Inference tensors do not track version counter"
        return False


def _ordinary(tensor: Tensor) -> Tensor:
    """The same memory, outside inference mode."""
    kind: Any = type(tensor)
    if is_traceable_wrapper_subclass(tensor):  # ComfyUI's quantised tensors: numbers and their scales
        names, context = tensor.__tensor_flatten__()
        parts = {name: _ordinary(getattr(tensor, name)) for name in names}
        view = kind.__tensor_unflatten__(parts, context, tensor.shape, tensor.stride())
    elif kind in (Tensor, nn.Parameter):
        view = _same_memory(tensor)
    else:  # the bytes of a GGUF file, and attributes that say how to read them
        view = _same_memory(tensor.as_subclass(Tensor)).as_subclass(kind)
        vars(view).update(vars(tensor))
    return nn.Parameter(view, requires_grad=False) if isinstance(tensor, nn.Parameter) else view


def _same_memory(tensor: Tensor) -> Tensor:
    # Not through DLPack: it refuses devices that are not the current one, and Macs before late 2025.
    empty = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return empty.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride())


def networks_of(patches: Any) -> list[nn.Module]:
    """Networks that patches of other nodes bring along: of a hypernetwork, an IP-Adapter."""
    held = (tree_leaves(vars(patch)) for patch in tree_leaves(patches) if hasattr(patch, "__dict__"))
    return list(dict.fromkeys(part for parts in held for part in parts if isinstance(part, nn.Module)))


@contextmanager
def ordinary_adapters(module: nn.Module) -> Iterator[None]:
    """The same for LoRAs in bypass mode, which run beside a layer and are none of its weights."""
    adapters = [hook.adapter for part in module.modules() for hook in _bypasses(vars(part).get("forward"))]
    before = [getattr(adapter, "weights", None) for adapter in adapters]
    try:
        for adapter, weights in zip(adapters, before, strict=True):
            if isinstance(weights, (tuple, list)):
                adapter.weights = type(weights)(map(_ordinary_if_tensor, weights))
        yield
    finally:
        for adapter, weights in zip(adapters, before, strict=True):
            if weights is not None:
                adapter.weights = weights


def _bypasses(forward: Any) -> Iterator[Any]:
    """ComfyUI's hooks in the place of a layer's ``forward``, the outermost first."""
    hook = getattr(forward, "__self__", None)
    while isinstance(hook, BypassForwardHook):
        yield hook
        hook = getattr(hook.original_forward, "__self__", None)


def _ordinary_if_tensor(value: Any) -> Any:
    return _ordinary(value) if isinstance(value, Tensor) and not _can_be_saved(value) else value


# Quantised layouts whose product knows no backward pass: ComfyUI's kernels take their weights one way round only.
WITHOUT_BACKWARD = {"TensorCoreConvRotW4A4Layout"}


@contextmanager
def differentiable_products(module: nn.Module) -> Iterator[None]:
    """Makes ComfyUI dequantise weights whose quantised product has no backward pass.

    Its fast fp8 product has none either, which ComfyUI would find out, and log, in every layer of every step.
    """

    def without_backward(part: Any) -> bool:
        return isinstance(part, comfy.ops.fp8_ops.Linear) or getattr(part, "layout_type", None) in WITHOUT_BACKWARD

    parts = [part for part in module.modules() if without_backward(part)]
    before = [part.weight_function for part in parts]
    try:
        for part, functions in zip(parts, before, strict=True):
            part.weight_function = [*functions, _same]  # type: ignore[assignment,misc]
        yield
    finally:
        for part, functions in zip(parts, before, strict=True):
            part.weight_function = functions


def _same(weight: Tensor) -> Tensor:
    """ComfyUI hands every function of a weight plain numbers."""
    return weight


# Norms and rotations of queries and keys that comfy_kitchen does in one kernel, which has no backward pass.
FUSED = ("rms_rope", "rms_rope1", "rms_rope_split_half", "rms_rope_split_half1")


@contextmanager
def differentiable_rotations() -> Iterator[None]:
    """ComfyUI's models use comfy_kitchen's own plain version of what it does in one kernel.

    Most avoid the kernel in training by themselves; Anima, for one, does not.
    """
    kernels: Any = comfy.quant_ops.ck
    before = {name: getattr(kernels, name) for name in FUSED}
    try:
        for name in FUSED:
            setattr(kernels, name, getattr(comfy_kitchen.backends.eager.rope, name))
        yield
    finally:
        for name, kernel in before.items():
            setattr(kernels, name, kernel)


@contextmanager
def mutable_residuals(module: nn.Module) -> Iterator[None]:
    """Lets transformers add to their residual stream in place (``x += attention(norm(x))``).

    The norm has saved ``x`` for its backward pass when ``x`` changes. Giving every norm a copy of its
    input makes that harmless; frozen linear layers save none. Where an in-place change still spoils a
    saved tensor, autograd raises an error; no gradient becomes silently wrong.
    """
    # Hooks, since ComfyUI's patches (transformer_options) reach no norm, and nothing in a text encoder.

    def copy_input(_module, args, kwargs):
        args = tuple(_copied(value) for value in args)
        return args, {name: _copied(value) for name, value in kwargs.items()}

    norms = [part for part in module.modules() if "Norm" in type(part).__name__]
    handles = [part.register_forward_pre_hook(copy_input, with_kwargs=True) for part in norms]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) and value.requires_grad else value


class _Saved:
    """A tensor that autograd has saved, and all that it has saved of the same memory."""

    def __init__(self, tensor: Tensor, alike: "WeakSet[_Saved]") -> None:
        self.tensor, self.alike = tensor, alike


class _CopiesBeforeChange(TorchDispatchMode):
    def __init__(self, saved: WeakValueDictionary[int, WeakSet[_Saved]]) -> None:
        super().__init__()
        self._saved = saved

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        for number, name in _changed_by(func):
            for tensor in tree_leaves(args[number] if number < len(args) else kwargs.get(name)):
                for one in self._saved.pop(_memory(tensor), ()) if isinstance(tensor, Tensor) else ():
                    one.tensor = one.tensor.clone()
        return func(*args, **kwargs)


@functools.cache
def _changed_by(func: Any) -> list[tuple[int, str]]:
    """Places and names of what an operation of PyTorch writes to."""
    parts = enumerate(func._schema.arguments)
    return [(number, part.name) for number, part in parts if part.alias_info and part.alias_info.is_write]


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


@contextmanager
def mutable_saved_tensors() -> Iterator[None]:
    """Patches of other nodes may change in place what autograd has saved: it is copied before.

    PyTorch's own ``allow_mutation_on_saved_tensors`` knows tensors by numbers that it never forgets. They come again
    once a tensor is freed, and in a later step it hands out one for another.
    """
    saved: WeakValueDictionary[int, WeakSet[_Saved]] = WeakValueDictionary()  # of each memory, while it is saved

    def save(tensor: Tensor) -> _Saved:
        alike = saved.setdefault(_memory(tensor), WeakSet())
        # With its graph it would keep itself alive, all of a step where that fails.
        alike.add(one := _Saved(tensor.detach() if tensor.requires_grad else tensor, alike))
        return one

    with torch.autograd.graph.saved_tensors_hooks(save, lambda one: one.tensor), _CopiesBeforeChange(saved):
        yield


class _SavesCopies(TorchDispatchMode):
    """The same where a block is recomputed: there PyTorch's checkpointing saves what it detaches."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        return out.clone() if func is torch.ops.aten.detach.default else out


def _saving_copies() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    return nullcontext(), _SavesCopies()


@contextmanager
def checkpointed_blocks(module: nn.Module, mutable: bool = False) -> Iterator[None]:
    """Recomputes each block in the backward pass instead of storing its activations.

    Blocks are the outermost modules inside the lists of ``module`` that are no lists themselves:
    ResBlock and SpatialTransformer of a UNet, the transformer blocks of a DiT. With ``mutable`` they may change in
    place what autograd has saved.
    """
    # An entry in the instance's dictionary shadows the class's method; another pack may have one. Core's Train LoRA
    # does it so too: ComfyUI's patches_replace takes no ResBlock, and one patch a block, which may be another pack's.
    before = [(block, vars(block).get("forward")) for block in _blocks(module)]
    contexts = _saving_copies if mutable else noop_context_fn
    try:
        for block, _ in before:
            block.forward = functools.partial(_recomputed, block.forward, contexts)
        yield
    finally:
        for block, forward in before:
            vars(block).pop("forward", None)
            if forward is not None:
                block.forward = forward


def _blocks(module: nn.Module, inside_list: bool = False) -> Iterator[nn.Module]:
    is_list = isinstance(module, (nn.ModuleList, nn.Sequential))
    if inside_list and not is_list:
        yield module
        return
    for child in module.children():
        yield from _blocks(child, inside_list or is_list)


def _recomputed(forward, contexts, *args, **kwargs):
    # ComfyUI notes the current block in transformer_options while it runs, and blocks may change
    # their inputs in place: the second run must see what the first one saw.
    def run(*args, **kwargs):
        return forward(*map(_fresh, args), **{name: _fresh(value) for name, value in kwargs.items()})

    snapshot = [dict(value) if isinstance(value, dict) else value for value in args]
    named = {name: dict(value) if isinstance(value, dict) else value for name, value in kwargs.items()}
    return checkpointed(run, *snapshot, contexts=contexts, **named)


def _fresh(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, dict):
        return dict(value)
    return type(value)(map(_fresh, value)) if type(value) in (list, tuple) else value


@contextmanager
def training_flag() -> Iterator[None]:
    """Tells ComfyUI's models to take their differentiable paths."""
    before = comfy.model_management.in_training
    comfy.model_management.in_training = True
    try:
        yield
    finally:
        comfy.model_management.in_training = before
