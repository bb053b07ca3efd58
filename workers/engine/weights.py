"""Weights from safetensors files: each tensor is taken once, by name and shape; what is missing or left over is an error."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

import torch
from safetensors import SafetensorError, safe_open

from stratakv.errors import SetupError

_IGNORED_SUFFIXES = (".rotary_emb.inv_freq",)


class WeightSource:
    """The tensors of a model directory, opened without reading them."""

    def __init__(self, directory: Path, device: torch.device) -> None:
        self._directory = directory
        self._device = device
        self._stack = ExitStack()
        self._files: dict[str, safe_open] = {}
        self._taken: set[str] = set()
        for path in sorted(directory.glob("*.safetensors")):
            try:
                file = self._stack.enter_context(safe_open(path, framework="pt", device="cpu"))
            except (SafetensorError, OSError) as error:
                raise SetupError(f"{path} is not a whole safetensors file: {error}") from error
            self._files |= dict.fromkeys(file.keys(), file)

    def __enter__(self) -> WeightSource:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.close()

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """One tensor, converted. Raises SetupError if it is not there or has another shape."""
        if name not in self._files:
            raise SetupError(f"{self._directory} lacks the tensor {name}.", hint="Is the download whole?")
        tensor: torch.Tensor = self._files[name].get_tensor(name)  # type: ignore[no-untyped-call]
        if tuple(tensor.shape) != shape:
            raise SetupError(f"{name} in {self._directory} has shape {tuple(tensor.shape)}, config.json asks {shape}.")
        self._taken.add(name)
        return tensor.to(device=self._device, dtype=dtype, copy=True)

    def ignore(self, name: str) -> None:
        """Leave a tensor out knowingly."""
        self._taken.add(name)

    def finish(self) -> None:
        """Raises SetupError if the files hold tensors that were not taken: the model is not what config.json says."""
        left = [n for n in self._files if n not in self._taken and not n.endswith(_IGNORED_SUFFIXES)]
        if left:
            shown = ", ".join(sorted(left)[:3])
            raise SetupError(f"{self._directory} has {len(left)} tensors that its architecture does not know: {shown}.")
