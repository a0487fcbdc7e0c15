"""A device that is not the CPU, on a CPU: "meta" here stands for a GPU that has no float64, such as Apple's.

Inside `with OtherDevice():` what is made on or moved to "meta" is a `There`, whose numbers are in CPU memory. It is an
error to make a float64 tensor there, and to compute with tensors from both places.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

aten = torch.ops.aten
MOVES = {aten._to_copy.default, aten.copy_.default}
MAY_MIX = {*MOVES, aten.index.Tensor, aten.index_put_.default, aten._index_put_impl_.default}  # by indices of the CPU


class There(torch.Tensor):
    """A tensor on the other device."""

    @staticmethod
    def __new__(cls, here):
        kind = dict(strides=here.stride(), storage_offset=here.storage_offset(), dtype=here.dtype, requires_grad=False)
        return torch.Tensor._make_wrapper_subclass(cls, here.shape, device="meta", **kind)

    def __init__(self, here):
        assert here.dtype != torch.float64, "float64 on a device that has none"
        self.here = here

    __torch_function__ = torch._C._disabled_torch_function_impl
    is_meta = False  # or load_state_dict warns that it would copy nothing

    def tolist(self):
        return self.here.tolist()

    def __format__(self, specification):
        return format(self.here, specification)

    def __reduce_ex__(self, protocol):  # torch.save
        return self.here.__reduce_ex__(protocol)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return compute(function, args, kwargs or {})


class OtherDevice(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return compute(function, args, kwargs or {})


def compute(function, args, kwargs):
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    there = [tensor for tensor in tensors if isinstance(tensor, There)]
    wanted = kwargs.get("device")
    if there and function not in MAY_MIX:
        strangers = [tensor for tensor in tensors if not isinstance(tensor, There) and tensor.dim()]
        assert not strangers, f"{function} of tensors on two devices"
    on_cpu = tree_map(lambda leaf: leaf.here if isinstance(leaf, There) else leaf, (args, kwargs))
    if wanted is not None:
        on_cpu[1]["device"] = "cpu"
    out = function(*on_cpu[0], **on_cpu[1])
    if function is aten.copy_.default:
        return args[0]
    if there if wanted is None else torch.device(wanted).type == "meta":
        out = tree_map(lambda leaf: There(leaf) if isinstance(leaf, torch.Tensor) else leaf, out)
        return return_and_correct_aliasing(function, args, kwargs, out)
    return out
