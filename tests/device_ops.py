"""What a device other than a CPU would be asked for: the ATen ops of a call, and whether PyTorch has them for MPS."""

from __future__ import annotations

from pathlib import Path

import torch
import torchgen
import yaml
from torch.utils._python_dispatch import TorchDispatchMode


class Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.add(func.name())
        out = func(*args, **(kwargs or {}))
        for leaf in torch.utils._pytree.tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.dtypes.add(leaf.dtype)
        return out


def native_functions() -> dict[str, dict]:
    """ "aten::name.overload" -> its entry in the list of ops that PyTorch is built from."""
    path = Path(torchgen.__file__).parent / "packaged/ATen/native/native_functions.yaml"
    with path.open() as file:
        entries = yaml.load(file, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    return {f"aten::{entry['func'].split('(')[0]}": entry for entry in entries}


# What a view or a composite of other ops needs from a device is nothing; these have an implementation for each device.
_ANY_DEVICE = ("CompositeExplicitAutograd", "CompositeExplicitAutogradNonFunctional", "CompositeImplicitAutograd")


def has_mps_kernel(name: str, entries: dict[str, dict]) -> bool:
    entry = entries[name]
    if "structured_delegate" in entry:  # implemented by its out variant
        name = f"aten::{entry['structured_delegate']}"
        entry = entries[name]
    dispatch = entry.get("dispatch")
    if dispatch is None:  # composite without a dispatch table
        return True
    keys = {key.strip() for line in dispatch for key in line.split(",")}
    return "MPS" in keys or any(key in keys for key in _ANY_DEVICE)


SYNCS = ("_local_scalar_dense", "item", "nonzero", "masked_select", "is_nonzero", "equal", "unique", "bincount")
