# SPDX-License-Identifier: MIT
"""A device for tests, "second": its tensors lie in the memory of the CPU and are computed there, and it refuses what
CUDA refuses. `use` registers it with torch: one per process. Where there is a GPU, it is CUDA itself.

As on CUDA, an operation takes all its tensors from one device, but a 0-dim tensor of the CPU counts as a number in
pointwise operations, indices of the CPU may index a tensor of the device, and copies go between devices. What the host
reads makes it wait for the device, and so does a copy from or to it that is not non_blocking. `waits` counts this by
the function of a script that asked. On an H100, CUDA refused and allowed the same.

`fallback` gets every operation that torch does not compose of others, below autograd and autocast. The storage of a
tensor is one of the device, over host memory, so views, autograd and the sharing of weights are torch's own.
"""

import traceback
from collections import Counter
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

NAME = "cuda" if torch.cuda.is_available() else "second"
CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
READS = ("_local_scalar_dense", "nonzero", "masked_select", "equal")  # the host must know a value, or a size
INDEXING = ("index", "_index_put_impl_")
SET = torch.ops.aten.set_.source_Storage_storage_offset
LIBRARY = torch.library.Library("_", "IMPL")  # what it registers stays as long as it is alive

waits: Counter[str] = Counter()


class Module(_DummyBackendModule):
    """torch.second; under autocast nothing is cast."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


def storage_over(host: torch.UntypedStorage) -> torch.UntypedStorage:
    """A storage of the device over the memory of one of the CPU."""
    storage = torch._C._construct_storage_from_data_pointer(host.data_ptr(), torch.device(NAME, 0), host.nbytes())
    storage.host = host  # lives as long as the storage
    return storage


def tensor_of_device(x: Tensor, into: Tensor | None = None) -> Tensor:
    """A tensor of the device over the memory of a tensor of the CPU."""
    into = torch._C._acc.create_empty_tensor([0], x.dtype) if into is None else into
    return SET.redispatch(CPU, into, storage_over(x.untyped_storage()), x.storage_offset(), x.shape, x.stride())


def tensor_of_host(x: Tensor) -> Tensor:
    """A tensor of the CPU over the memory of a tensor of the device."""
    return torch.empty(0, dtype=x.dtype).set_(x.untyped_storage().host, x.storage_offset(), x.shape, x.stride())


def wait(operation: str) -> None:
    asked = [x.name for x in traceback.extract_stack() if x.filename.endswith(("/grpo.py", "/ppo.py"))]
    waits[f"{operation} in {asked[-1] if asked else 'autograd'}"] += 1


def each(change: Callable, x: object) -> object:
    """`change` every tensor of nested lists."""
    if isinstance(x, Tensor):
        return change(x)
    return type(x)([each(change, y) for y in x]) if isinstance(x, list | tuple) else x


@cache
def about(op: OpOverload) -> tuple[str, dict[str, str], set[str]]:
    """Of an operation: its name, the types of its arguments, and which of them may be a 0-dim tensor of the CPU."""
    packet, arguments = op.overloadpacket, op._schema.arguments
    pointwise = any(torch.Tag.pointwise in getattr(packet, name).tags for name in packet.overloads())
    takes_numbers = pointwise or packet.__name__ in INDEXING
    numbers = {a.name for a in arguments if takes_numbers and not (a.alias_info and a.alias_info.is_write)}
    return packet.__name__, {a.name: str(a.type) for a in arguments}, numbers


def copy(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    """Between the devices, or within this one."""
    if not non_blocking and source.is_cpu != target.is_cpu and source.numel():
        wait("copy to the device" if source.is_cpu else "copy to the CPU")
    source, written = (x if x.is_cpu else tensor_of_host(x) for x in (source, target))
    written.copy_(source)
    return target


def fallback(op: OpOverload, *args: object, **kwargs: object) -> object:
    """Any operation on tensors of the device, or with device="second"."""
    if op.is_view or op is SET:  # only sizes and strides
        return op.redispatch(CPU, *args, **kwargs)
    name, types, numbers = about(op)
    if name == "_copy_from":
        return copy(*args)
    given, originals = dict(zip(types, args, strict=False)) | kwargs, {}
    reads = name in READS
    if name == "_index_put_impl_":  # moves indices, and looks for the places of a mask
        reads = any(x.is_cpu or x.dtype == torch.bool for x in given["indices"] if x is not None)
    if reads:
        wait(name)

    def host_tensor(argument: str, x: Tensor) -> Tensor:
        if x.is_cpu:
            if (x.dim() == 0 and argument in numbers) or (name in INDEXING and argument == "indices"):
                return x
            raise RuntimeError(f"{op}: expected all tensors to be on the same device, but {argument} is on the CPU")
        host = tensor_of_host(x)
        originals[id(host)] = host, x
        return host

    given = {key: each(lambda x, key=key: host_tensor(key, x), value) for key, value in given.items()}
    if "device" in given:
        given["device"] = torch.device("cpu")
    for key, value in given.items():
        if types[key] == "Tensor" and not isinstance(value, Tensor):  # a number that torch had made a tensor
            given[key] = torch.tensor(value, dtype=torch.result_type(next(iter(originals.values()))[0], value))
    result = op(**given)
    for host, x in originals.values():
        if host.shape != x.shape:  # an empty out=
            tensor_of_device(host, x)
    return each(lambda x: originals[id(x)][1] if id(x) in originals else tensor_of_device(x), result)


def use() -> None:
    """Make the device known to torch, for the rest of the process."""
    if NAME == "cuda":
        torch.rand_like = lambda x: torch.rand(x.shape, dtype=x.dtype).to(NAME)  # the numbers of a run on the CPU
        return
    _setup_privateuseone_for_python_backend(NAME, Module())
    clone = torch.UntypedStorage.clone  # copy.deepcopy needs it
    torch.UntypedStorage.clone = lambda x: storage_over(clone(x.host)) if x.device.type == NAME else clone(x)
    LIBRARY.fallback(fallback, "PrivateUse1")
    LIBRARY.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
