"""Lets Triton's interpreter end small numbers where a GPU does, and spares it what it does again and again.

That is half of its time in these tests. But for those small numbers every result stays the same, and whatever could
fail still does. All of it holds for Triton 3.6 and 3.7.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

# Types of which two operands need no other type, whatever is done with them.
ALIKE = {"int1", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "fp32", "fp64"}
FLOATS, INTEGERS = {"fp32", "fp64"}, {"int32", "int64"}

SMALLEST = np.float32(2.0**-126)  # of the float32 numbers with all their digits


def end_small_numbers() -> None:
    """Makes the interpreter of this process take float32 numbers below 2^−126 for 0 where a compiled kernel does.

    By the PTX for sm_80 and sm_90 that are the results of `tl.exp2` (ex2.approx.ftz) and the operands of `tl.sqrt` and
    `tl.rsqrt`. Sums, products, quotients, `tl.exp`, `tl.log` and `tl.log2` keep such numbers.
    """
    builder = interpreter.InterpreterBuilder
    exp2, sqrt, rsqrt = builder.create_exp2, builder.create_sqrt, builder.create_rsqrt

    def ended(handle: Any) -> Any:
        x = handle.data
        if x.dtype != np.float32:
            return handle
        return interpreter.TensorHandle(np.where(np.abs(x) < SMALLEST, np.float32(0), x), handle.dtype.scalar)

    builder.create_exp2 = lambda self, x: ended(exp2(self, x))
    builder.create_sqrt = lambda self, x: sqrt(self, ended(x))
    builder.create_rsqrt = lambda self, x: rsqrt(self, ended(x))


def spare_repetitions() -> None:
    """Makes the interpreter of this process quicker."""
    patch_language_once_a_launch()
    find_types_of_numpy_once()
    describe_blocks_once()
    make_types_of_blocks_once()
    find_common_types_once()
    leave_like_operands_alone()
    look_for_constants_where_they_are()
    measure_elements_once()
    call_language_directly()
    leave_out_unread_checks()


def patch_language_once_a_launch() -> None:
    """From now on a function that a kernel calls does not patch Triton's language again.

    The interpreter patches the language when it launches a kernel, and restores it at the end (`_patch_lang`). It does
    so again in each call within the kernel, where it looks at every name of the language and finds each one patched.
    """
    patch = interpreter._patch_lang

    @functools.cache
    def languages(function: Callable[..., object]) -> list[object]:
        """The modules of the language that `_patch_lang` patches for a function."""
        return [language for language in (tl, tl.core) if any(one is language for one in function.__globals__.values())]

    def patch_where_needed(function: Callable[..., object]) -> interpreter._LangPatchScope:
        found = languages(function)
        if found and not any(tl.core.is_builtin(language.load) for language in found):
            return interpreter._LangPatchScope()
        return patch(function)

    interpreter._patch_lang = patch_where_needed


def find_types_of_numpy_once() -> None:
    """The interpreter makes the table of NumPy's types whenever it looks one up."""
    find = functools.cache(interpreter._get_np_dtype)

    def find_once(dtype: tl.dtype) -> np.dtype[Any]:
        # Those of pointers cannot be hashed, and a block has the type of its elements.
        return np.dtype(np.uint64) if dtype.scalar.is_ptr() else find(dtype.scalar)

    interpreter._get_np_dtype = find_once


def describe_blocks_once() -> None:
    """Each result is a tensor with the type of its block, and both describe their shape in many small objects.

    They are the same for each block of the same elements and shape, and nothing changes them.
    """
    describe_type, describe_tensor = tl.block_type.__init__, tl.tensor.__init__
    types: dict[str, dict[str, Any]] = {}
    tensors: dict[str, dict[str, Any]] = {}

    def init_type(self: tl.block_type, element_ty: tl.dtype, shape: Any) -> None:
        # As text, in which 16.0 is not the 16 that a block may have.
        key = f"{element_ty.name} {[getattr(size, 'value', size) for size in shape]}"
        if key not in types:
            describe_type(self, element_ty, shape)
            types[key] = dict(vars(self))
        vars(self).update(types[key])

    def init_tensor(self: tl.tensor, handle: object, type: tl.dtype) -> None:
        if type.name not in tensors:
            describe_tensor(self, handle, type)
            tensors[type.name] = {**vars(self), "handle": None}
        vars(self).update(tensors[type.name], handle=handle)

    tl.block_type.__init__, tl.tensor.__init__ = init_type, init_tensor


def make_types_of_blocks_once() -> None:
    """The type of a block with other elements is made once, and that of a block in the interpreter's IR not again.

    In the IR of the interpreter a type is the language's own.
    """
    change, to_ir = tl.block_type.with_element_ty, tl.block_type.to_ir
    types: dict[tuple[str, str], tl.block_type] = {}

    def with_element_ty(self: tl.block_type, scalar_ty: tl.dtype) -> tl.block_type:
        key = self.name, scalar_ty.name
        if key not in types:
            types[key] = change(self, scalar_ty)
        return types[key]

    def to_own_ir(self: tl.block_type, builder: object) -> Any:
        own = builder is interpreter.interpreter_builder and self.element_ty.name in ALIKE
        return self if own else to_ir(self, builder)

    tl.block_type.with_element_ty, tl.block_type.to_ir = with_element_ty, to_own_ir


def find_common_types_once() -> None:
    """Of two types there is one in which an operator computes, whatever the operands are."""
    find = TritonSemantic.computation_type_impl
    types: dict[tuple[str, bool, str, bool, bool], tl.dtype] = {}

    def find_once(self: Any, a_ty: tl.dtype, a_is_scalar: bool, b_ty: tl.dtype, b_is_scalar: bool, div: bool) -> Any:
        key = a_ty.name, a_is_scalar, b_ty.name, b_is_scalar, div
        if key not in types:
            types[key] = find(self, a_ty, a_is_scalar, b_ty, b_is_scalar, div)
        return types[key]

    TritonSemantic.computation_type_impl = find_once


def leave_like_operands_alone() -> None:
    """Two operands of one type and shape are neither cast nor broadcast, and of two shapes only what is smaller is.

    The interpreter comes to that after it has promoted their types, and compared sizes as constants of the language.
    A number beside a tensor that holds it is made in the tensor's type and shape at once.
    """
    prepare, broadcast, cast = (
        TritonSemantic.binary_op_type_checking_impl,
        TritonSemantic.broadcast_impl_value,
        TritonSemantic.cast,
    )

    common: dict[tuple[str, str], list[int] | None] = {}

    def prepare_unlike(self: Any, lhs: Any, rhs: Any, *flags: bool, **named: bool) -> Any:
        left, right = isinstance(lhs, tl.tensor), isinstance(rhs, tl.tensor)
        if left and right:
            # Half precisions are divided in float32, and whether pointers may be operands is asked in there.
            if (name := lhs.type.scalar.name) in ALIKE and name == rhs.type.scalar.name:
                return (lhs, rhs) if lhs.type.name == rhs.type.name else self.broadcast_impl_value(lhs, rhs)
        elif left and holds(lhs.type.scalar.name, rhs):
            return lhs, filled(self, lhs.type, rhs)
        elif right and holds(rhs.type.scalar.name, lhs):
            return filled(self, rhs.type, lhs), rhs
        return prepare(self, lhs, rhs, *flags, **named)

    def holds(name: str, number: object) -> bool:
        """Whether a tensor with such elements and the number are computed in the type of the tensor."""
        if type(number) is int:
            return name in FLOATS or (name in INTEGERS and -(2**31) <= number < 2**31)
        return type(number) is float and name in FLOATS

    def filled(self: Any, like: Any, number: float) -> Any:
        scalar = like.scalar
        # Of the two zeros, the interpreter makes the positive one.
        data = np.full(like.shape if like.is_block() else 1, number or 0, interpreter._get_np_dtype(scalar))
        return self.tensor(interpreter.TensorHandle(data, scalar), like)

    def broadcast_unlike(self: Any, lhs: Any, rhs: Any) -> Any:
        if not lhs.type.is_block():
            return (splat(self, lhs, rhs.type) if rhs.type.is_block() else lhs), rhs
        if not rhs.type.is_block():
            return lhs, splat(self, rhs, lhs.type)
        key = lhs.type.name, rhs.type.name
        if key not in common:
            common[key] = common_shape([*lhs.type.shape], [*rhs.type.shape])
        if (shape := common[key]) is None:
            return broadcast(self, lhs, rhs)
        return stretched(self, lhs, shape), stretched(self, rhs, shape)

    def common_shape(left: list[int], right: list[int]) -> list[int] | None:
        """None where the language must add dimensions or refuse the shapes."""
        shape = [*map(max, left, right)]
        alike = len(left) == len(right) and all(
            size in (1, most) for size, most in zip(left + right, shape * 2, strict=True)
        )
        return shape if alike else None

    def splat(self: Any, scalar: Any, block: Any) -> Any:
        return self.tensor(self.builder.create_splat(block, scalar.handle), block.with_element_ty(scalar.type.scalar))

    def stretched(self: Any, operand: Any, shape: list[int]) -> Any:
        if operand.type.shape.values == shape:
            return operand
        handle = self.builder.create_broadcast(operand.handle, shape)
        return self.tensor(handle, tl.block_type(operand.type.scalar, shape))

    def cast_unlike(self: Any, input: Any, dst_ty: Any, *how: Any, **named: Any) -> Any:
        return input if input.type.scalar.name == dst_ty.scalar.name else cast(self, input, dst_ty, *how, **named)

    TritonSemantic.binary_op_type_checking_impl = prepare_unlike
    TritonSemantic.broadcast_impl_value = broadcast_unlike
    TritonSemantic.cast = cast_unlike


def look_for_constants_where_they_are() -> None:
    """What a function of the language is given is mostly a tensor, a number or a type, and has no constants inside.

    The language asks first whether it is a list or a tuple, whose elements may be some.
    """
    unwrap, holders = tl.core._unwrap_if_constexpr, (list, tuple, tl.tuple, tl.constexpr)
    plain: set[type] = set()

    def unwrap_at_once(given: Any) -> Any:
        kind = type(given)
        if kind is tl.constexpr:
            return given.value
        if kind not in plain:
            if issubclass(kind, holders):
                return unwrap(given)
            plain.add(kind)
        return given

    tl.core._unwrap_if_constexpr = unwrap_at_once


def measure_elements_once() -> None:
    """How large an element of a type may be is asked for each result, and for that of two operands twice."""
    fits = interpreter._validate_np_data_size
    known: dict[tuple[object, str], bool] = {}

    def fits_by_type(data: Any, dtype: tl.dtype) -> bool:
        key = data.dtype, dtype.name
        if key not in known:
            known[key] = fits(data, dtype)
        return known[key]

    interpreter._validate_np_data_size = fits_by_type


def call_language_directly() -> None:
    """The interpreter's stand-in for a function of the language copies the arguments, and calls one that calls it."""

    # Whoever wraps a function in another way may do more.
    wrapper = tl.core.builtin(spare_repetitions).__code__

    def patch(obj: object, name: str, member: Callable[..., Any], builder: object, scope: Any) -> None:
        function = member.__wrapped__ if member.__code__ is wrapper else member

        def call(*args: Any, **named: Any) -> Any:
            named["_semantic"] = interpreter.interpreter_semantic
            return function(*args, **named)

        scope.set_attr(obj, name, call)

    interpreter._patch_attr = patch


def leave_out_unread_checks() -> None:
    """The interpreter computes for each sum, difference and product of integers whether it overflows, in nine
    operations. It asserts that only where it debugs, which it never does.
    """
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
