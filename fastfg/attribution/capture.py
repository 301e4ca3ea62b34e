"""Record the attention of every block of a model, by intercepting ``F.scaled_dot_product_attention``.

In the forward pass, each attention runs unchanged and fused. In the backward pass, which visits the blocks from the
last to the first, a hook on the attention's output receives its gradient ``dO``. Relevancy needs only ``dO`` and
``q, k, v``, so no attention map is stored.

The output of the FIRST attention is the leaf of the graph: autograd records nothing before it, and the backward pass
ends there.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import CheckpointError

from fastfg.attribution.gradient_scale import unscaled
from fastfg.models.adapter import Adapter, check_distinct, stream_of
from fastfg.models.hooks import in_this_thread, reader
from fastfg.torch_internals import multi_head_attention_forward

OnAttention = Callable[[int, Tensor, Tensor, Tensor, Tensor, float], None]  # number, q, k, v, dO, scale
OnResidual = Callable[[int, Tensor, Tensor], None]  # block, x, g

HINT = (
    "fastfg intercepts F.scaled_dot_product_attention and nn.MultiheadAttention in blocks that are called as "
    "modules, block(x). Switch the model's attention to one of the two, or pass a fastfg.models.Adapter with its own "
    "`meet`"
)

INFERENCE_TENSOR = "Inference tensors cannot be saved for backward"
WRITTEN_INTO = ("modified by an inplace operation", "leaf Variable that requires grad is being used in an in-place")


@contextmanager
def named_errors(name: str) -> Iterator[None]:
    """Context in which autograd's errors about the model ``name`` say what the model does."""
    try:
        yield
    except CheckpointError as error:
        raise RuntimeError(
            f"model: expected {name} to run without activation checkpointing, which runs parts of it again in the "
            "backward pass: switch it off"
        ) from error
    except RuntimeError as error:
        if INFERENCE_TENSOR in str(error):
            raise RuntimeError(
                f"model: expected tensors that gradients can flow through, but {name} uses one that was made under "
                "torch.inference_mode(), perhaps a cache: run the model outside of it first"
            ) from error
        if any(text in str(error) for text in WRITTEN_INTO):
            raise RuntimeError(
                f"model: expected {name} to leave tensors as they are that its gradients need, such as the output of "
                "an attention, but it writes into one: x = x * 2 in place of x *= 2"
            ) from error
        raise


class Capture(TorchFunctionMode):
    """Context that records one forward pass in this thread: each attention, and the residual stream of some blocks.

    Every block must run once, in order, with one attention of its own over all tokens. Anything else is an error.

    Args:
        adapter: the model.
        shape: (B, N), the numbers of images and tokens.
        layers: the blocks whose output ``x_l`` and gradient ``g_l`` are passed to ``on_residual``.
        on_residual: called in the backward pass with (block, x [B, N, d], g [B, N, d]), before the backward pass
            reaches the attention of that block.
        on_attention: functions, each called in the backward pass with (number, q, k, v, dO, scale), tensors
            [B, H, N, dh]. The attention of block ``l`` has number ``l``. A pooling head's attention has the number
            after the last block's.
        root: where the backward pass ends, a leaf that requires gradients. None: at the first attention's output.
    """

    def __init__(
        self,
        adapter: Adapter,
        shape: tuple[int, int],
        layers: Collection[int],
        on_residual: OnResidual,
        on_attention: Sequence[OnAttention],
        root: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.adapter, self.shape, self.layers = adapter, shape, layers
        self.on_residual, self.on_attention = on_residual, on_attention
        self.root = root
        self.name = type(adapter.model).__qualname__
        self.inside: int | None = None  # the block that is running
        self.stream: Tensor | None = None  # the output of the block that ran last
        self.ran: list[int] = []  # blocks, in the order in which they were called
        self.met: list[int | None] = []  # for each attention, the block in which it ran
        self.arrived: list[int] = []  # attentions whose gradient has arrived
        self.residuals: set[int] = set()  # blocks at whose output the gradient has arrived
        self.read: tuple[Tensor, Tensor, Tensor] | None = None  # by the head: see _note_pooled
        self.last: Tensor | None = None  # the output of the last block [B, N, d]
        self.listens = False  # whether gradients are those of the backward pass
        self.in_float16 = False  # whether an attention is
        self.scale: Tensor | None = None  # [B], what the gradients that arrive are to be divided by

    # The forward pass ----------------------------------------------------------------------------------------

    def __enter__(self) -> Capture:
        check_distinct(self.adapter)
        self.owner = reader()
        with ExitStack() as handles:  # removes the hooks if one can't be registered
            for handle in self._register():
                handles.callback(handle.remove)
            self.handles = handles.pop_all()
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self.handles.close()
        self.stream = None
        if exception[0] is not None:
            self.root = self.last = None  # their hooks refer back to this object

    def _register(self) -> Iterable[Any]:
        for number, block in enumerate(self.adapter.blocks):
            yield block.register_forward_pre_hook(in_this_thread(self._enters(number)), with_kwargs=True)
            yield block.register_forward_hook(in_this_thread(self._leaves(number)))
        if self.adapter.meet is not None:
            yield from self.adapter.meet(self)

    def _enters(self, block: int) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            if self.inside is not None:
                raise RuntimeError(
                    f"model: expected {self.name} to run one block after another, but it ran block {block} inside "
                    f"block {self.inside}"
                )
            given = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]
            if self.stream is not None and given and not any(_reads(t, self.stream) for t in given):
                raise RuntimeError(
                    f"model: expected block {block} of {self.name} to read the output of block {self.ran[-1]}, which "
                    "ran before it; it does not"
                )
            self.ran.append(block)
            self.inside = block

        return hook

    def _leaves(self, block: int) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            self.inside = None
            self.stream = stream = stream_of(output, block, self.shape)
            if block == len(self.adapter.blocks) - 1:
                self.last = stream
                if not self.adapter.later_attentions and stream.requires_grad:
                    stream.register_hook(self._note_pooled)
            if block in self.layers and stream.requires_grad:
                x = stream.detach().clone()  # the model may write into its tensors after the block
                stream.register_hook(lambda g: self._residual_arrives(block, x, g))

        return hook

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and reader() == self.owner:
            return self._attention(*args, **kwargs)
        if func is F.multi_head_attention_forward and reader() == self.owner:
            return multi_head_attention_forward(self._attention, *args, **kwargs)
        return func(*args, **kwargs)

    def _attention(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        options = dict(zip(("attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa"), args, strict=False)) | kwargs
        for name in ("attn_mask", "dropout_p", "is_causal", "enable_gqa"):
            if isinstance(options.get(name), Tensor) or options.get(name):
                raise ValueError(f"model: expected plain self-attention in every block, got {name}={options[name]!r}")
        out = F.scaled_dot_product_attention(query, key, value, **options)
        return self._meet(query, key, value, out, options.get("scale") or query.shape[-1] ** -0.5)

    def meet(self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, scale: float, transposed: bool = False) -> Tensor:
        """Register one attention of an adapter's own; see :class:`fastfg.models.adapter.MeetsAttention`."""
        met = self._meet(q, k, v, out, scale, transposed)
        self._check_output(q, k, v, out.transpose(1, 2) if transposed else out, scale)
        return met

    def _meet(self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, scale: float, transposed: bool = False) -> Tensor:
        if self.inside is not None:
            self._check_tokens(q, k, v)
        if self.root is None:
            out = self.root = out.detach().requires_grad_()
        if not out.requires_grad:
            if self.inside is not None and self.inside in self.met:
                raise RuntimeError(
                    f"model: expected one attention in block {self.inside} of {self.name}, met another one beside it"
                )
            raise RuntimeError(
                f"model: expected gradients to flow through {self.name}, but they stop before its attention number "
                f"{len(self.met)} (torch.no_grad or gradient checkpointing in its forward?)"
            )
        number, q, k, v = len(self.met), q.detach(), k.detach(), v.detach()
        self.in_float16 |= q.dtype == torch.float16
        out.register_hook(
            lambda dO: self._attention_arrives(number, q, k, v, dO.transpose(1, 2) if transposed else dO, scale)
        )
        self.met.append(self.inside)
        return out

    def _check_tokens(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Check that the block's attention covers all tokens of all images."""
        B, N = self.shape
        for name, t in (("queries", q), ("keys", k), ("values", v)):
            if t.ndim != 4 or t.shape[2] != N:
                met = t.shape[2] if t.ndim == 4 else list(t.shape)
                raise RuntimeError(f"model: expected {N} tokens in block {self.inside}, met {met} ({name})")
            if t.shape != q.shape or t.shape[0] != B:
                raise RuntimeError(
                    f"model: expected {name} [{B}, H, {N}, dh] in block {self.inside}, the same for queries, keys and "
                    f"values, met {list(t.shape)}"
                )

    @torch.no_grad()
    def _check_output(self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, scale: float) -> None:
        """Check ``out = softmax(scale q k^T) v`` for the first query: the output may have been computed otherwise."""
        dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        with torch.autocast(q.device.type, enabled=False):
            scores = q[:, :, :1].to(dtype) @ k.to(dtype).mT * scale
            expected = scores.softmax(-1) @ v.to(dtype)
            error = (out[:, :, :1] - expected).abs().amax()
            # TF32 and a softmax in float32 keep 11 bits; the error of a score grows with the score
            precision = max(2**-11, *(torch.finfo(t.dtype).eps for t in (q, k, v, out)))
            allowed = 4 * precision * (1 + scores.abs().amax()) * v.abs().amax()
        if bool(error > allowed):
            where = "after the blocks" if self.inside is None else f"in block {self.inside}"
            raise RuntimeError(
                f"model: expected the attention {where} of {self.name} to be softmax({scale:g} q k^T) v, but its "
                f"output differs by {float(error):.3g} (a hook that changes the attention, or another scale?)"
            )

    def take_last(self) -> Tensor | None:
        """The output of the last block [B, N, d]. It is kept no longer, as its hook refers back to this object."""
        last, self.last = self.last, None
        return last

    def check_images_apart(self, y: Tensor, last: Tensor | None) -> None:
        """Raise ValueError where the value of an image in ``y`` [B] has a gradient at the tokens of another image.

        Its map would change with the batch that it is in. The values of half of the images must have no gradient at the
        last block's output for the others; any two images are in different halves once.
        """
        n = len(y)
        if n < 2 or last is None or not last.requires_grad or not y.requires_grad:
            return
        number = torch.arange(n, device=y.device)
        halves = [number.bitwise_right_shift(bit) % 2 == side for bit in range((n - 1).bit_length()) for side in (0, 1)]
        mixed = torch.zeros((), dtype=torch.bool, device=y.device)  # asked for once, as that waits for the device
        for half in halves:
            (g,) = torch.autograd.grad(y, last, half.to(y.dtype), retain_graph=True, allow_unused=True)
            if g is not None:
                mixed |= ((g.nan_to_num(0.0) != 0).flatten(1).any(1) & ~half).any()
        if bool(mixed):
            raise ValueError(
                "target: expected a function of each row of the output alone, got one whose value for an image "
                "depends on the rows of others"
            )

    # The backward pass ---------------------------------------------------------------------------------------

    def backward(self, y: Tensor, scale: Tensor | None = None) -> Tensor:
        """Run the backward pass of the targets ``y`` [B] down to the root; it calls the callbacks.

        Args:
            scale: [B], the factor of the gradients on their way; those that are passed on have it no more. None: 1.

        Returns the gradient at the root. Raises RuntimeError if a block or its attention did not run as expected.
        """
        self._check_forward()
        root, self.root = self.root, None  # its hook refers back to this object
        assert root is not None
        self.scale, self.listens = scale, True
        factors = torch.ones_like(y) if scale is None else scale.to(y.dtype)
        gradient = torch.autograd.grad(y, root, factors, allow_unused=True)[0] if y.requires_grad else None
        missing = sorted(set(range(len(self.adapter.blocks))) - set(self.arrived))
        if missing or gradient is None:
            raise RuntimeError(
                f"model: expected the target to depend on the attention of every block of {self.name}, but it does "
                f"not depend on that of {missing}"
            )
        self._check_pooled()
        return unscaled(gradient, scale)

    def _check_forward(self) -> None:
        blocks = list(range(len(self.adapter.blocks)))
        if self.ran != blocks:
            raise RuntimeError(
                f"model: expected {self.name} to run its {len(blocks)} blocks once each and in order, but it ran "
                f"{self.ran}. {HINT}"
            )
        if self.met != [*blocks, *[None] * self.adapter.later_attentions]:
            where = ["outside of them" if block is None else block for block in self.met]
            raise RuntimeError(
                f"model: expected one attention of {self.name} in each of its {len(blocks)} blocks and "
                f"{self.adapter.later_attentions} after them, met {len(where)}, in blocks {where}. {HINT}"
            )

    def _note_pooled(self, g: Tensor) -> None:
        """Note which tokens the gradient ``g`` [B, N, d] at the last block's output reaches."""
        if not self.listens:
            return
        pooled = self.adapter.first_row(g.shape[1], torch.float32, g.device) != 0
        others = (g.abs() > 0).any(-1).any(0) & ~pooled  # NaN is not > 0
        unread = pooled & (g == 0).all(-1).all(0)
        read = (g != 0).any(-1).any(0)
        self.read = pooled, read, (others.any() | unread.any()) & read.any()

    def _check_pooled(self) -> None:
        """Check that it reaches just the pooled tokens. This waits for the device, so it comes last."""
        if self.read is None:
            return
        pooled, read, wrong = self.read
        if bool(wrong):
            raise RuntimeError(
                f"model: expected the head of {self.name} to read the tokens {_numbers(pooled)}, as its adapter's "
                f"`pooled` says, but the target depends on the tokens {_numbers(read)} of the last block"
            )

    def _residual_arrives(self, block: int, x: Tensor, g: Tensor) -> None:
        if not self.listens:
            return
        self.residuals.add(block)
        with torch.autocast(x.device.type, enabled=False):
            self.on_residual(block, x, unscaled(g, self.scale))

    def _attention_arrives(self, number: int, q: Tensor, k: Tensor, v: Tensor, dO: Tensor, scale: float) -> None:
        if not self.listens:
            return
        L = len(self.adapter.blocks)
        if number < L:
            awaited = L - 1 - sum(n < L for n in self.arrived)
            if number != awaited:
                raise RuntimeError(
                    f"model: expected the gradient of {self.name} to reach the attention of block {awaited} next, but "
                    f"it reached that of block {number}: the target must depend on every block"
                )
            if number in self.layers and number not in self.residuals:
                raise RuntimeError(
                    f"model: expected the target to depend on the output of block {number} of {self.name}, which is "
                    "gated; it does not"
                )
        self.arrived.append(number)
        if self.scale is not None:  # small gradients stay what they are, so everything is in float32 from here on
            q, k, v, dO = q.float(), k.float(), v.float(), unscaled(dO, self.scale)
        with torch.autocast(q.device.type, enabled=False):
            for callback in self.on_attention:
                callback(number, q, k, v, dO, scale)


def _numbers(mask: Tensor) -> str:
    """The indices at which ``mask`` is True; the first eight of many."""
    found = mask.nonzero().flatten().tolist()
    return str(found) if len(found) <= 8 else f"{str(found[:8])[:-1]}, ...]"


def _reads(given: Tensor, stream: Tensor) -> bool:
    """Whether ``given`` is ``stream`` or was computed from it. True if ``stream`` has no gradients to tell by."""
    if given is stream or stream.grad_fn is None:
        return True
    waiting, seen = [given.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is stream.grad_fn:
            return True
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [following for following, _ in node.next_functions]
    return False
