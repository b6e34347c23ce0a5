"""Registers everything Python knows about an op in one call: reference, fake, autograd, autocast and example."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import _direct, _env, _library, _torch_private
from . import _check, _errors
from ._example import Call, Draw, Example

NAMESPACE = "warpform"
# The reason of the bindings where the user asked for the reference: it needs no warning.
REQUESTED = "WARPFORM_BACKEND=reference"
# Of an op that has no implementation but its reference on the device of its tensors.
REFERENCE_ALONE = "it has no kernel for this device"

# A registration lasts as long as its Library.
_libraries: list[torch.library.Library] = []
_warned: set[tuple[str, str]] = set()
# The lists of `fallbacks` that are being filled.
_watching: list[list[tuple[str, str]]] = []


@dataclass(frozen=True)
class RegisteredOp:
    """The facts of a registered op. `ops()` returns those of all ops, for code that goes through every one."""

    name: str
    reference: Callable[..., Any]
    example: Example
    backward: Callable[..., Any] | None
    setup_context: Callable[..., None] | None

    @property
    def differentiable(self) -> bool:
        """Whether it has a gradient."""
        return self.backward is not None

    @property
    def family(self) -> str:
        """The file of `ops.reference` that defines it."""
        return self.reference.__module__.rpartition(".")[2]

    def calls(self, dtype: torch.dtype) -> list[Call]:
        """The example's calls, tensors under test in `dtype`, on the CPU; the same in every run."""
        return list(self.example(Draw(self.name, dtype)))


_ops: dict[str, RegisteredOp] = {}


def ops() -> dict[str, RegisteredOp]:
    """Every op by its name, each followed by its backward; also where the library is not loaded."""
    ordered: dict[str, RegisteredOp] = {}
    for name, op in _ops.items():
        if name.removesuffix("_backward") == name or name.removesuffix("_backward") not in _ops:
            ordered[name] = op
            if f"{name}_backward" in _ops:
                ordered[f"{name}_backward"] = _ops[f"{name}_backward"]
    return ordered


def register_op(
    name: str,
    *,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    example: Example,
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., None] | None = None,
    autocast: Sequence[str] = (),
    validate: Callable[..., None] | None = None,
) -> Callable[..., Any]:
    """Registers warpform::NAME and warpform::NAME_reference, whose schemas the library defines, and returns a call.

    What is returned takes the op's arguments. It goes straight to the kernels where nothing needs torch's dispatcher
    (`warpform._C`), and through `torch.ops.warpform.NAME` otherwise. Both ways check the arguments in C++
    (csrc/torch/NAME's file) and raise TypeError and ValueError.

    Args:
        name: the op's name, without a namespace.
        reference: the definition in PyTorch, called with the op's arguments.
        fake: the same with outputs of the right shapes and dtypes and no values; sizes may be symbolic.
        example: a generator of small calls that between them reach every kernel of the op. doctor, the GPU check and
            opcheck make them.
        backward: (ctx, *gradients of the outputs) -> one gradient for each positional argument. None for an op that is
            not differentiable: differentiating through it raises.
        setup_context: (ctx, inputs, output) or (ctx, inputs, keyword_only_inputs, output), saves what backward needs.
        autocast: the arguments that autocast casts; all others keep their dtype. Empty: autocast leaves the op alone.
        validate: called with the op's arguments where WARPFORM_VALIDATE=1: checks of values, which wait for the device.
            It comes after the op, whose checks say what else is wrong, and whose kernels clamp what they read.

    Where the library is not loaded nothing is registered, and what is returned raises the load error when it is called.
    """
    _ops[name] = RegisteredOp(name, reference, example, backward, setup_context)
    if not _library.loaded():

        @functools.wraps(reference)
        def unavailable(*args: Any, **kwargs: Any) -> Any:
            _library.require()
            raise ImportError(f"{NAMESPACE}: {name} was not registered when warpform was imported")

        return unavailable

    def reference_with_reason(reason: str, *args: Any, **kwargs: Any) -> Any:
        try:
            _report(name, reason, args)
            return reference(*args, **kwargs)
        except Exception as error:
            # This is called from C++, and torch 2.10 and 2.11 lose the text on the way back.
            getattr(torch.ops, NAMESPACE)._keep_error(type(error).__name__, str(error))
            raise

    @functools.wraps(reference)
    def reference_alone(*args: Any, **kwargs: Any) -> Any:
        for seen in _watching:
            seen.append((name, REFERENCE_ALONE))
        return reference(*args, **kwargs)

    def checked_fake(*args: Any, **kwargs: Any) -> Any:
        _errors.check_devices(name, op._schema, args, kwargs)
        return fake(*args, **kwargs)

    def fake_with_reason(reason: str, *args: Any, **kwargs: Any) -> Any:
        return fake(*args, **kwargs)

    implement(f"{name}_reference", reference_with_reason, fake=fake_with_reason)
    op = implement(
        name, reference_alone, fake=checked_fake, backward=backward, setup_context=setup_context, autocast=autocast
    )
    return _callable(name, op, validate, backward, setup_context)


def _callable(
    name: str,
    op: Any,
    validate: Callable[..., None] | None,
    backward: Callable[..., Any] | None,
    setup_context: Callable[..., None] | None,
) -> Callable[..., Any]:
    """What `register_op` returns for a registered op."""

    names = [argument.name for argument in op._schema.arguments]

    def through_torch(*args: Any, **kwargs: Any) -> Any:
        if _env.log_debug():
            _check.log(name, **dict(zip(names, args, strict=False)), **kwargs)
        try:
            result = op(*args, **kwargs)
        except (AttributeError, RuntimeError, TypeError, ValueError) as error:
            explained = _errors.explained(op, args, kwargs, error)
            if explained is None:
                raise
            raise explained from None
        if validate is not None and _env.validate():
            validate(*args, **kwargs)
        return result

    def straight(*args: Any, **kwargs: Any) -> Any:
        return direct(*args, **kwargs)

    recorded = None if backward is None else autograd_function(op, straight, backward, setup_context)
    direct = _direct.direct(name, through_torch, recorded)

    def call(*args: Any, **kwargs: Any) -> Any:
        # A compiler traces the op itself: it takes sizes that are symbols, and asks nothing of this process.
        return op(*args, **kwargs) if torch.compiler.is_compiling() else direct(*args, **kwargs)

    call.__name__ = call.__qualname__ = name
    return call


def autograd_function(
    op: Any,
    forward: Callable[..., Any],
    backward: Callable[..., Any],
    setup_context: Callable[..., None] | None,
) -> Callable[..., Any]:
    """The op with the rule of its registration as a function of `torch.autograd`: it needs no dispatcher.

    `forward` is called where no gradients are recorded, so it goes straight to the kernels.
    """
    name = op._opname
    arguments = op._schema.arguments
    positional = [argument for argument in arguments if not argument.kwarg_only]
    keyword_only = [argument for argument in arguments if argument.kwarg_only]

    def run(ctx: Any, *inputs: Any) -> Any:
        values, keywords = inputs[:-1], inputs[-1]
        output = forward(*values, **keywords)
        if setup_context is not None and keyword_only:
            setup_context(ctx, values, keywords, output)
        elif setup_context is not None:
            setup_context(ctx, values, output)
        return output

    def differentiate(ctx: Any, *gradients: Any) -> Any:
        found = backward(ctx, *gradients)
        return (*found, None) if isinstance(found, tuple) else (found, None)

    # Made so that nodes of the graph have the op's name.
    members = {"forward": staticmethod(run), "backward": staticmethod(differentiate)}
    function: Any = type(name, (torch.autograd.Function,), members)

    def recorded(*args: Any, **kwargs: Any) -> Any:
        inputs = list(args)
        for argument in positional[len(args) :]:
            inputs.append(kwargs.pop(argument.name) if argument.name in kwargs else argument.default_value)
        for argument in keyword_only:
            value = kwargs.setdefault(argument.name, argument.default_value)
            if isinstance(value, Tensor) and value.requires_grad:
                raise ValueError(f"{name}: {argument.name} has no gradient; pass {argument.name}.detach()")
        return function.apply(*inputs, kwargs)

    return recorded


def implement(
    name: str,
    implementation: Callable[..., Any],
    *,
    fake: Callable[..., Any],
    schema: str | None = None,
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., None] | None = None,
    autocast: Sequence[str] = (),
) -> Any:
    """Registers the Python side of one op: the implementation below autograd, the fake, autograd and autocast.

    Args:
        schema: defines the op; None for an op whose schema the library defines.
        name, fake, backward, setup_context, autocast: as in `register_op`.
    """
    library = torch.library.Library(NAMESPACE, "FRAGMENT")
    _libraries.append(library)
    if schema is not None:
        library.define(schema)
    op = getattr(getattr(torch.ops, NAMESPACE), name).default
    library.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=library)
    library.impl(name, _autograd_kernel(op, backward, setup_context), "Autograd", with_keyset=True)
    if autocast:
        for device_type in ("cuda", "cpu"):
            library.impl(name, _autocast_kernel(op, device_type, autocast), f"Autocast{device_type.upper()}")
    return op


@contextlib.contextmanager
def fallbacks() -> Iterator[list[tuple[str, str]]]:
    """Yields a list that gets (op, reason) for each reference that runs inside in place of a kernel, in any thread."""
    seen: list[tuple[str, str]] = []
    _watching.append(seen)
    try:
        yield seen
    finally:
        # By identity: two lists may be equal.
        _watching[:] = [other for other in _watching if other is not seen]


def _report(name: str, reason: str, args: Sequence[Any]) -> None:
    """Says that the reference runs. On a CPU it says so to `fallbacks` alone: some calls have no kernel there."""
    for seen in _watching:
        seen.append((name, reason))
    if reason == REQUESTED or _on_cpu(args):
        return
    if _env.strict():
        raise RuntimeError(f"{name}: no kernel runs this ({reason}), and WARPFORM_STRICT=1 forbids the reference")
    if (name, reason) not in _warned:
        _warned.add((name, reason))
        warnings.warn(f"{name}: the PyTorch reference runs instead of a kernel: {reason}", stacklevel=3)


def _on_cpu(args: Sequence[Any]) -> bool:
    return bool(args) and isinstance(args[0], Tensor) and args[0].device.type == "cpu"


def _autograd_kernel(
    op: Any, backward: Callable[..., Any] | None, setup_context: Callable[..., None] | None
) -> Callable[..., Any]:
    """The rule that `torch.library.register_autograd` makes, and errors where that rule would give silent zeros.

    That function itself refuses schemas with keyword-only tensors, and its rule drops forward-mode tangents.
    """
    name = op._opname

    def not_differentiable(ctx: Any, *gradients: Tensor) -> None:
        if name.endswith("_backward"):
            raise RuntimeError(
                f"{name.removesuffix('_backward')}: double backward is not implemented; "
                "call backward or grad without create_graph=True"
            )
        raise RuntimeError(f"{name} has no gradient; call the differentiable op instead")

    rule = _torch_private.autograd_rule(op, backward or not_differentiable, setup_context)

    def kernel(keyset: Any, *args: Any, **kwargs: Any) -> Any:
        # Both look at a global alone: this runs on every call outside of inference mode.
        if _torch_private.in_forward_mode() and _has_tangent((*args, *kwargs.values())):
            raise NotImplementedError(f"{name}: forward-mode differentiation is not implemented")
        if _torch_private.in_functorch():
            raise NotImplementedError(f"{name}: torch.func transforms are not implemented; use torch.autograd")
        for key, value in kwargs.items():
            if isinstance(value, Tensor) and value.requires_grad and torch.is_grad_enabled():
                raise ValueError(f"{name}: {key} has no gradient; pass {key}.detach()")
        return rule(keyset, *args, **kwargs)

    return kernel


def _has_tangent(values: Sequence[Any]) -> bool:
    return any(isinstance(v, Tensor) and forward_ad.unpack_dual(v).tangent is not None for v in values)


def _autocast_kernel(op: Any, device_type: str, names: Sequence[str]) -> Callable[..., Any]:
    positions = frozenset(i for i, argument in enumerate(op._schema.arguments) if argument.name in names)

    def kernel(*args: Any, **kwargs: Any) -> Any:
        dtype = torch.get_autocast_dtype(device_type)
        cast = [_cast(value, dtype, device_type) if i in positions else value for i, value in enumerate(args)]
        with torch.autocast(device_type, enabled=False):
            return op(*cast, **kwargs)

    return kernel


def _cast(value: Any, dtype: torch.dtype, device_type: str) -> Any:
    # float64 stays, as under torch's own autocast: who uses it asked for it.
    if isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64:
        return value.to(dtype) if value.device.type == device_type else value
    return value
