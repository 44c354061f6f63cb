"""What both networks share: products, RMSNorm, rotary embedding, SwiGLU, attention of paths, strict loading."""

import contextlib
import copy
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

# Layers that Product.of joins: a file whose tensors are read side by side in this order is joined without a copy.
JOINED: Final = (("q_proj", "k_proj", "v_proj"), ("w1", "w3"))

# What torch on a CPU and ONNX Runtime say, in errors that are like any other.
_NO_MEMORY: Final = ("can't allocate memory", "Failed to allocate memory")

_Module = TypeVar("_Module", bound=nn.Module)


class WeightsMismatch(ValueError):
    """The tensors of a checkpoint are not those of a network that its config describes."""


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis (Zhang & Sennrich 2019, arXiv 1910.07467)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.to(self.weight.dtype), self.weight.shape, self.weight, self.eps)


class Product(nn.Linear):
    """A linear layer that multiplies in the precision of its weight."""

    @classmethod
    def of(cls, *layers: nn.Linear) -> "Product":
        """One layer with the outputs of all `layers`, which share their input; a single one shares its tensors."""
        outputs, biased = sum(layer.out_features for layer in layers), layers[0].bias is not None
        with torch.device("meta"):
            found = cls(layers[0].in_features, outputs, bias=biased)
        found.weight = _joined([layer.weight for layer in layers])
        if biased:
            found.bias = _joined([layer.bias for layer in layers])
        return found

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.to(self.weight.dtype), self.weight, self.bias)


@torch.no_grad()
def _joined(tensors: list[Tensor]) -> nn.Parameter:
    first, rows = tensors[0], sum(len(tensor) for tensor in tensors)
    if _side_by_side(tensors):
        return nn.Parameter(first.as_strided((rows, *first.shape[1:]), first.stride()), requires_grad=False)
    return nn.Parameter(torch.cat(tensors), requires_grad=False)


def _side_by_side(tensors: Sequence[Tensor]) -> bool:
    """Whether each begins in memory where the one before it ends."""
    return all(
        left.is_contiguous()
        and right.is_contiguous()
        and left.untyped_storage().data_ptr() == right.untyped_storage().data_ptr()
        and left.storage_offset() + left.numel() == right.storage_offset()
        for left, right in itertools.pairwise(tensors)
    )


class Int8Product(nn.Module):
    """A Product that reads its weight in 8 bits, one scale per output: for few rows, which wait for the reading.

    Takes and gives float32. Rows are rounded to bfloat16 and no further: a scale taken from them would couple them.
    """

    weight: Tensor
    scale: Tensor

    def __init__(self, product: Product) -> None:
        super().__init__()
        weight = product.weight.detach()
        scale = (weight.abs().amax(-1) / 127).clamp_min(1e-30).bfloat16()
        rounded = (weight / scale.float().unsqueeze(-1)).round().clamp(-127, 127)
        self.register_buffer("weight", rounded.to(torch.int8))
        self.register_buffer("scale", scale)
        self.bias = product.bias

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2).bfloat16()
        found = torch.ops.aten._weight_int8pack_mm(rows, self.weight, self.scale).float()
        out: Tensor = (found if self.bias is None else found + self.bias).view(*x.shape[:-1], -1)
        return out


def swiglu(gate: Tensor, value: Tensor) -> Tensor:
    """silu(gate) * value (Shazeer 2020, arXiv 2002.05202)."""
    return F.silu(gate) * value


def rotary_angles(positions: Tensor, head_width: int, theta: float = 10_000.0) -> Tensor:
    """Angles `[..., D/2]` of rotary position embeddings (Su et al. 2021, arXiv 2104.09864)."""
    exponents = torch.arange(0, head_width, 2, device=positions.device, dtype=torch.float32) / head_width
    frequencies: Tensor = torch.pow(theta, -exponents)
    angles: Tensor = positions.unsqueeze(-1).float() * frequencies
    return angles


def split_heads(x: Tensor, heads: int) -> Tensor:
    """`[..., T, D]` to `[..., N, T, D / N]`."""
    parts: Tensor = x.unflatten(-1, (heads, -1)).transpose(-3, -2)
    return parts


def merge_heads(x: Tensor) -> Tensor:
    """`[..., N, T, D / N]` to `[..., T, D]`."""
    return x.transpose(-3, -2).flatten(-2)


def branched_attention(
    q: Tensor, prefix: tuple[Tensor, Tensor, Tensor], own: Sequence[tuple[Tensor, Tensor, Tensor | None]]
) -> Tensor:
    """Attention of paths' queries `[B, S, N, Q, W]` over the prefix they share and their own tokens, together.

    `prefix` keys and values `[B, N, T, W]` are read once for all paths; each of `own` has keys and values
    `[B, S, N, O, W]`: parts that lie apart in memory are never copied together. The third of each is added to
    the scores: `[B, 1, 1, T]` and something broadcastable to `[B, S, N, Q, O]`.
    """
    paths = (q.shape[1], q.shape[3])
    q = q * q.shape[-1] ** -0.5
    together = q.transpose(1, 2).flatten(2, 3)  # [B, N, S * Q, W]
    shared = (together @ prefix[0].transpose(-1, -2)).float() + prefix[2]  # [B, N, S * Q, T]
    scores = [shared.unflatten(2, paths).transpose(1, 2)]  # [B, S, N, Q, T]
    for keys, _, mask in own:
        found = (q @ keys.transpose(-1, -2)).float()
        scores.append(found if mask is None else found + mask)
    sizes = [part.shape[-1] for part in scores]
    weights = torch.cat(scores, dim=-1).softmax(-1).to(q.dtype).split(sizes, dim=-1)
    from_prefix = weights[0].transpose(1, 2).flatten(2, 3) @ prefix[1]
    combined: Tensor = from_prefix.unflatten(2, paths).transpose(1, 2)
    for weight, (_, values, _) in zip(weights[1:], own, strict=True):
        combined = combined + weight @ values
    return combined


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether memory, the device's or the machine's, is what was missing."""
    known = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return known or any(words in str(error) for words in _NO_MEMORY)


def on_device(arrays: Mapping[str, np.ndarray], device: torch.device) -> dict[str, Tensor]:
    """The arrays as tensors of `device`; to a GPU from pinned memory, so that nobody waits until it is free."""
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    if device.type != "cuda":
        return {name: tensor.to(device) for name, tensor in tensors.items()}
    return {name: tensor.pin_memory().to(device, non_blocking=True) for name, tensor in tensors.items()}


def copied_to(module: _Module, dtype: torch.dtype, kind: type[nn.Module] = nn.Module) -> _Module:
    """A copy of `module` whose modules of `kind` have floating tensors of `dtype`; those are not copied as they are."""
    converted: dict[int, Any] = {}
    for each in module.modules():
        if isinstance(each, kind):
            for parameter in each.parameters(recurse=False):
                converted[id(parameter)] = nn.Parameter(parameter.detach().to(dtype, copy=True), requires_grad=False)
            for buffer in each.buffers(recurse=False):
                if buffer.is_floating_point():
                    converted[id(buffer)] = buffer.to(dtype, copy=True)
    return copy.deepcopy(module, converted)


class _Unfilled(TorchFunctionMode):
    """Leaves the tensors of new layers as they are; on the meta device, filling them imports half of torch."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        fills = getattr(func, "__module__", "") == nn.init.__name__
        return kwargs["tensor"] if fills else func(*args, **(kwargs or {}))


@contextlib.contextmanager
def shapes_alone() -> Iterator[None]:
    """Networks that are made inside take no memory, until `load_strictly` gives them tensors."""
    with torch.device("meta"), _Unfilled():
        yield


def load_strictly(network: nn.Module, weights: Mapping[str, Tensor], what: str) -> None:
    """Load `weights` whole, in fp32; WeightsMismatch names every tensor that is missing, extra or misshapen.

    A network of shapes alone takes the tensors themselves, as far as they are fp32; others copy them.
    """
    expected = network.state_dict()
    problems = [f"missing {name} {list(expected[name].shape)}" for name in expected if name not in weights]
    problems += [f"unexpected {name} {list(weights[name].shape)}" for name in weights if name not in expected]
    problems += [
        f"{name} is {list(tensor.shape)}, the config needs {list(expected[name].shape)}"
        for name, tensor in weights.items()
        if name in expected and tensor.shape != expected[name].shape
    ]
    problems += [f"{name} is of {t.dtype}" for name, t in weights.items() if not t.is_floating_point()]
    problems = problems or [f"{name} holds NaN or infinity" for name, t in weights.items() if not _is_finite(t)]
    if problems:
        shown = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
        raise WeightsMismatch(f"{what}: {shown}")
    adopted = all(tensor.is_meta for tensor in expected.values())
    network.load_state_dict({name: tensor.float() for name, tensor in weights.items()}, assign=adopted)


def _is_finite(tensor: Tensor) -> bool:
    """One pass that writes nothing: isfinite takes twenty times as long."""
    return not tensor.numel() or all(math.isfinite(edge) for edge in torch.aminmax(tensor.detach()))
