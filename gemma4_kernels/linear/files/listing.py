"""What is in a file or folder of weights, and how one tensor at a time is read from it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

from torch import Tensor

from gemma4_kernels.checks import FormatError, WeightFileError
from gemma4_kernels.linear.weight import QuantizedWeight

Reader = Callable[[], QuantizedWeight | Tensor]


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a file, or one layer that the file keeps as several."""

    name: str
    scheme: str
    """A scheme of `QuantizedWeight`, a dtype ("BF16") for what is not quantised, or the name of what is not read."""
    shape: tuple[int, ...]
    """(N, K) for weights."""
    nbytes: int
    """In the file."""
    quantized: bool
    refusal: str = ""
    """Why it is not read, with what to use instead; empty where it is."""

    @property
    def parameters(self) -> int:
        return prod(self.shape)


class WeightFiles:
    """An opened file or folder. Nothing but headers has been read, and no file is kept open.

    path, format ("gguf" or "safetensors"), metadata (what the header or the folder's config says, as plain values) and
    tensors (name -> TensorInfo, in the order of the file) say what is in it.
    """

    def __init__(
        self, path: Path, format: str, metadata: Mapping[str, str | int | float | bool], tensors: Mapping[str, TensorInfo],
        readers: Mapping[str, Reader],
    ) -> None:  # fmt: skip
        self.path = path
        self.format = format
        self.metadata = dict(metadata)
        self.tensors = dict(tensors)
        self._readers = dict(readers)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors in the file."""
        return sum(info.nbytes for info in self.tensors.values())

    def load(self, name: str) -> QuantizedWeight | Tensor:
        """Read one tensor: a QuantizedWeight, or a tensor in its own dtype where it is not quantised.

        Raises: KeyError for a name that is not there; FormatError for a format that is not read, with what to use
            instead; WeightFileError for data that is damaged; OSError if the file has gone.
        """
        info = self.tensors[name]
        if info.refusal:
            raise FormatError(f"{self.path}: {name}: {info.refusal}")
        try:
            return self._readers[name]()
        except WeightFileError:
            raise
        except FormatError as error:
            raise FormatError(f"{self.path}: {name}: {error}") from error
        except (TypeError, ValueError) as error:  # a tensor that does not fit the others of its layer
            raise WeightFileError(f"{self.path}: {name}: {error}") from error

    def weights(self) -> Iterator[QuantizedWeight]:
        """All quantised weights, one after the other, with their names. Nothing of one is kept when the next is read.

        Raises: as `load`.
        """
        for name, info in self.tensors.items():
            if info.quantized:
                weight = self.load(name)
                assert isinstance(weight, QuantizedWeight)
                yield weight
                del weight  # before the next is read: the caller may have let go of it
