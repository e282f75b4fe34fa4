"""A CUDA device for tests on machines without one: tensors that live on the CPU, but say that they are on cuda:0.

`cuda_stand_in` patches PyTorch. An operation that mixes devices raises as it would on a GPU, and so do `.numpy()` of a
CUDA tensor and an index on CUDA into a CPU tensor. What would make the host wait for the GPU (`.item()`, `.cpu()`,
`bool(...)`) is counted. Times, memory, kernels and compiled code are not imitated. (PyTorch's own FakeTensorMode cannot
run a backward pass on CUDA without a driver, and its tensors have no values.)

Inside `torch.func` transforms a tensor is wrapped and its device is not seen; such tensors mix with both.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar
from unittest import mock

import torch
from torch._functorch import apis, eager_transforms
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map

CUDA = torch.device("cuda", 0)
_CREATE = {
    getattr(torch, name)
    for name in (
        "arange", "as_tensor", "empty", "empty_strided", "eye", "full", "linspace", "normal", "ones", "rand", "randint",
        "randn", "randperm", "tensor", "zeros",
    )
}  # fmt: skip
_LIKE = ("empty_like", "full_like", "ones_like", "rand_like", "randn_like", "zeros_like")
_NEW = ("new_empty", "new_full", "new_ones", "new_tensor", "new_zeros")
_LIKE_OR_NEW = {getattr(torch, n) for n in _LIKE} | {getattr(torch.Tensor, n) for n in _NEW}
_READ = {  # which the host waits for
    getattr(torch.Tensor, n): n
    for n in ("item", "tolist", "__bool__", "__int__", "__float__", "__index__", "nonzero", "cpu")
}
_MAY_MIX = {torch.Tensor.copy_, torch.Tensor.__setitem__, torch.Tensor.__getitem__, torch.Tensor.to}
_SAID = {
    torch.Tensor.device.__get__: CUDA,
    torch.Tensor.is_cuda.__get__: True,
    torch.Tensor.is_cpu.__get__: False,
    torch._has_compatible_shallow_copy_type: False,  # so that modules get new parameters when they move
}
_DATA = {torch.Tensor.data.__set__, torch.Tensor.grad.__set__}


class CudaTensor(torch.Tensor):
    """A CPU tensor that says it is on cuda:0."""

    reads: ClassVar[Counter] = Counter()

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function in _SAID:
            return _SAID[function]
        if function is torch.Tensor.numpy:
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        if function is torch.Tensor.pin_memory:
            raise RuntimeError("cannot pin a tensor that is on cuda:0; only dense CPU tensors can be pinned")
        if function is torch.Tensor.__deepcopy__:
            return _deep_copy(*args)
        if function in _READ:
            CudaTensor.reads[_READ[function]] += 1
        _check_devices(function, args, kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            if function is torch.Tensor.cpu:
                return _plain(args[0]).clone()
            if function in (torch.Tensor.to, torch.Tensor.cuda):
                return _moved(function, args, kwargs)
            if function in _LIKE_OR_NEW and kwargs.get("device") is not None:
                device = torch.device(kwargs.pop("device"))
                return _on(function(*map(_plain, args), **kwargs), device)
            result = function(*args, **kwargs)
        return tree_map(_marked, result)


def _marked(value: object) -> object:
    """A tensor that an operation on CUDA tensors has made."""
    plain = isinstance(value, torch.Tensor) and not isinstance(value, CudaTensor)
    return value.as_subclass(CudaTensor) if plain and not _is_wrapped(value) else value


def _deep_copy(tensor: CudaTensor, memo: dict) -> CudaTensor:
    with torch._C.DisableTorchFunctionSubclass():
        copy = _plain(tensor).detach().clone().as_subclass(CudaTensor).requires_grad_(tensor.requires_grad)
        if getattr(tensor, "_is_param", False):
            copy._is_param = True
    memo[id(tensor)] = copy
    return copy


def _plain(value: object) -> object:
    return value.as_subclass(torch.Tensor) if isinstance(value, CudaTensor) else value


def _on(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    return _marked(tensor) if device.type == "cuda" else _plain(tensor)


def _is_wrapped(tensor: torch.Tensor) -> bool:
    """Whether a transform of `torch.func` holds the tensor."""
    return torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def _check_devices(function, args: tuple, kwargs: dict) -> None:
    """Raise as PyTorch does where CPU and CUDA tensors meet; numbers (0-dimensional CPU tensors) may meet any."""
    tensors = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, torch.Tensor)]
    if function is torch.Tensor.__getitem__:
        if not isinstance(args[0], CudaTensor) and not _is_wrapped(args[0]):
            raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor (cpu)")
        for index in tensors[1:]:
            if not isinstance(index, CudaTensor) and not _is_wrapped(index):
                CudaTensor.reads["index on the CPU"] += 1  # is copied to the GPU first
            elif index.dtype == torch.bool:
                CudaTensor.reads["mask"] += 1
        return
    if function in _MAY_MIX or function in _DATA:
        return
    with torch._C.DisableTorchFunctionSubclass():
        on_cpu = [t for t in tensors if not isinstance(t, CudaTensor) and not _is_wrapped(t) and t.dim()]
    if on_cpu and any(isinstance(t, CudaTensor) for t in tensors):
        name = getattr(function, "__name__", str(function))
        raise RuntimeError(f"{name}: expected all tensors to be on the same device, but found cuda:0 and cpu")


def _moved(function, args: tuple, kwargs: dict) -> torch.Tensor:
    """`tensor.to(...)`, by the device or tensor among its arguments."""
    target, rest, given = None, [], dict(kwargs)
    if "device" in given:
        target = given.pop("device")
    for value in args[1:]:
        if isinstance(value, (str, torch.device)):
            target = value
        elif isinstance(value, torch.Tensor):
            target = CUDA if isinstance(value, CudaTensor) else torch.device("cpu")
            rest.append(value.dtype)
        elif isinstance(value, torch.dtype):  # the others say how to copy
            rest.append(value)
    if function is torch.Tensor.cuda:
        target, rest = CUDA, []
    given.pop("non_blocking", None)
    source = _plain(args[0])
    result = source.to(*rest, **given) if rest or given else source
    here = CUDA if isinstance(args[0], CudaTensor) else torch.device("cpu")
    target = here if target is None else torch.device(target)
    if target.type != here.type and result is source:
        result = source.clone()  # another device has a copy
    if target.type == "cpu" and here.type == "cuda":
        CudaTensor.reads["cpu"] += 1
    return args[0] if result is source and target.type == here.type else _on(result, target)


class _Creation(TorchFunctionMode):
    """Takes over what makes tensors on a device, and moves plain tensors."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function in _CREATE and kwargs.get("device") is not None:
            device = torch.device(kwargs.pop("device"))
            generator = kwargs.get("generator")
            if generator is not None and generator.device.type != device.type:
                raise RuntimeError(f"expected a {device.type} generator but found one of {generator.device.type}")
            made = function(*args, **kwargs)
            there = _on(made.detach(), device)
            return there.requires_grad_() if made.requires_grad else there
        if function in (torch.Tensor.to, torch.Tensor.cuda) and not isinstance(args[0], CudaTensor):
            if _is_wrapped(args[0]):
                return function(*args, **kwargs)
            return _moved(function, args, kwargs)
        if function in _LIKE_OR_NEW and kwargs.get("device") is not None and not isinstance(args[0], CudaTensor):
            return _on(function(*args, **{**kwargs, "device": "cpu"}), torch.device(kwargs["device"]))
        if function is torch.Tensor.pin_memory and not isinstance(args[0], CudaTensor):
            return args[0].clone()
        return function(*args, **kwargs)


class CudaGenerator(torch.Generator):
    """Stands in for `torch.Generator(device="cuda")`."""

    device = CUDA


class _AnyGenerator(torch.Generator):
    """Takes the place of `torch.Generator`."""

    def __new__(cls, device: object = "cpu") -> torch.Generator:
        return _Generator.__new__(CudaGenerator) if torch.device(device).type == "cuda" else _Generator(device)


_Generator = torch.Generator


def _transform(original):
    """A transform of `torch.func` whose results are on the device of its arguments."""

    def transform(*args, **kwargs):
        result = original(*args, **kwargs)
        on_cuda = any(isinstance(t, CudaTensor) for t in tree_flatten((args, kwargs))[0])
        return tree_map(_marked, result) if on_cuda else result

    return transform


@contextmanager
def cuda_stand_in() -> Iterator[Counter]:
    """PyTorch with a CUDA device; yields the counter of reads."""
    CudaTensor.reads.clear()
    overwrite = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    names = {
        "is_available": lambda: True, "device_count": lambda: 1, "set_device": lambda device: None,
        "synchronize": lambda device=None: None, "empty_cache": lambda: None, "max_memory_reserved": lambda: 10**9,
        "get_device_name": lambda device=None: "stand-in", "is_bf16_supported": lambda: True,
    }  # fmt: skip
    patches = [mock.patch.object(torch.cuda, name, function) for name, function in names.items()]
    patches.append(mock.patch.object(torch, "Generator", _AnyGenerator))
    # Adam asks whether its step is recorded as a graph; here nothing is
    patches.append(mock.patch.object(torch.cuda, "is_current_stream_capturing", return_value=False))
    patches.append(mock.patch.object(torch.accelerator, "current_accelerator", return_value=None))
    for place, name in (
        (apis, "vmap_impl"),
        (eager_transforms, "grad_impl"),
        (eager_transforms, "grad_and_value_impl"),
    ):
        patches.append(mock.patch.object(place, name, _transform(getattr(place, name))))
    for patch in patches:
        patch.start()
    try:
        with _Creation():
            yield CudaTensor.reads
    finally:
        for patch in patches:
            patch.stop()
        torch.__future__.set_overwrite_module_params_on_conversion(overwrite)
