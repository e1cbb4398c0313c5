"""Reading a checkpoint directory of Hugging Face's: config.json, and tensors one at a time.

The tensors are in the first of these that exists: model.safetensors, the shards of
model.safetensors.index.json, pytorch_model.bin, the shards of pytorch_model.bin.index.json.
"""

import os
import pickle

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from bipe_jax.errors import UserError
from bipe_jax.workdir import json_files

_DTYPES = ("float32", "float16", "bfloat16")


class Tensors:
    """The tensors of a checkpoint directory. Opening it reads only names and shapes.

    Args:
      directory: the checkpoint.
      most_rows: name -> number of rows of the tensor that are read.

    Attributes:
      shapes: name -> shape.

    Raises:
      UserError: a file is missing or incomplete, or PyTorch is needed and not installed.
    """

    def __init__(self, directory: str, most_rows: dict[str, int]):
        self._most_rows: dict[str, int] = {}
        self._sources = {}
        self.shapes = {}
        for path in _paths(directory):
            for name, (shape, read) in _open(path).items():
                self.shapes[name], self._sources[name] = shape, (path, read)
        for name, rows in most_rows.items():
            self.limit(name, rows)

    def limit(self, name: str, rows: int) -> None:
        """Leaves out a tensor's rows after the first `rows`, if there is such a tensor."""
        if first := self.shapes.get(name):
            self._most_rows[name] = rows
            self.shapes[name] = (min(first[0], rows), *first[1:])

    def read(self, name: str) -> np.ndarray:
        """One tensor: float32, float16 or bfloat16. Raises UserError for another dtype."""
        path, read = self._sources[name]
        try:
            tensor = read()
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"{path}: {name} cannot be read: {_line(error)}") from None
        return tensor[: self._most_rows.get(name)]


def path_in(directory: str, name: str) -> str:
    """The path of a file of a checkpoint directory, where there may be no such file.

    A link must lead to a file in the directory or, as in Hugging Face's cache, in the cache's `blobs`.

    Raises:
      UserError: the name leads out of the directory, or to something that is no regular file.
    """
    if name != os.path.basename(name) or name in ("", ".", "..") or not name.isprintable():
        raise UserError(f"{name!r} is not the name of a file in {directory}")
    path = os.path.join(directory, name)
    file = os.path.realpath(path)
    if os.path.lexists(file):
        inside = file.startswith(os.path.join(os.path.realpath(directory), ""))
        if not inside and not _is_blob(file):
            raise UserError(f"{path} is a link out of its directory, to {file}: copy that file")
        if not os.path.isfile(file):
            raise UserError(f"{path} must be a regular file")
    return path


def _is_blob(path: str) -> bool:
    """Whether a file is one of Hugging Face's cache: MODEL/blobs/HASH, which MODEL/snapshots link to."""
    blobs = os.path.dirname(path)
    model = os.path.dirname(blobs)
    return os.path.basename(blobs) == "blobs" and os.path.isdir(os.path.join(model, "snapshots"))


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _paths(directory: str) -> list[str]:
    for name in ("model.safetensors", "pytorch_model.bin"):
        path = path_in(directory, name)
        if os.path.exists(path):
            return [path]
        index = path_in(directory, f"{name}.index.json")
        if os.path.exists(index):
            names = json_files.read(index).get("weight_map")
            if not names or not isinstance(names, dict) or {*map(type, names.values())} != {str}:
                raise UserError(f"{index} has no weight_map with the file of each tensor")
            try:
                shards = [path_in(directory, shard) for shard in sorted(set(names.values()))]
            except UserError as error:
                raise UserError(f"{index}: {error}") from None
            if missing := [shard for shard in shards if not os.path.exists(shard)]:
                raise UserError(
                    f"{index} names {len(shards)} files, but {missing[0]} is missing: copy it again"
                )
            return shards
    raise UserError(
        f"{directory} has neither model.safetensors nor pytorch_model.bin, nor an index"
    )


def _open(path: str) -> dict:
    """Name -> (shape, function that reads the tensor)."""
    if path.endswith(".safetensors"):
        try:
            return _open_safetensors(path)
        except SafetensorError as error:
            raise UserError(
                f"{path} is half-written or no safetensors file: {_line(error)}"
            ) from None
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    return _open_pytorch(path)


def _open_safetensors(path: str) -> dict:
    # Not memory-mapped: pages of a mapped file would count as this process's memory.
    file = safe_open(path, framework="np", backend="pread")

    def entry(name):
        part = file.get_slice(name)
        dtype = part.get_dtype()

        def read():
            if dtype not in ("F32", "F16", "BF16"):
                raise UserError(_wrong_type(path, name, dtype))
            return file.get_tensor(name)

        return tuple(part.get_shape()), read

    return {name: entry(name) for name in file.keys()}  # noqa: SIM118, not a dict


def _wrong_type(path, name, dtype) -> str:
    return f"{path}: {name} is of type {dtype}; only {', '.join(_DTYPES)} can be read"


def _open_pytorch(path: str) -> dict:
    try:
        import torch
    except ImportError:
        raise UserError(
            f"{path} is a pickle, which only PyTorch reads safely, and that is not installed: "
            "pip install -e '.[convert]', or save the model as model.safetensors"
        ) from None
    try:
        try:
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap" not in str(error):
                raise
            # The format of PyTorch before 1.6 cannot be memory-mapped.
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(
            f"{path} holds more than tensors (code that a pickle would run), or is half-written: "
            "it is not read; save the model as model.safetensors"
        ) from None
    except Exception as error:
        raise UserError(f"{path} is half-written or no PyTorch file: {_line(error)}") from None
    if not isinstance(loaded, dict) or not all(
        isinstance(t, torch.Tensor) for t in loaded.values()
    ):
        raise UserError(f"{path} must hold a dict of tensors, a state_dict")

    def entry(name, tensor):
        def read():
            dtype = str(tensor.dtype).removeprefix("torch.")
            if dtype not in _DTYPES:
                raise UserError(_wrong_type(path, name, dtype))
            if dtype == "bfloat16":  # NumPy's bridge does not know it
                return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
            return tensor.numpy()

        return tuple(tensor.shape), read

    return {name: entry(name, tensor) for name, tensor in loaded.items()}
