"""Kernels that do not run: the reference computes the result, with one warning."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fusionc.codegen.program import Call, Program
from fusionc.errors import CompileError, StrictError
from fusionc.ops import KERNELS, direct, late, load
from fusionc.rescue import guarded


def test_a_kernel_that_does_not_build_costs_no_answer() -> None:
    def find() -> Any:
        def kernel(x: int) -> int:
            raise CompileError("one_row", None, "out of resource: shared memory")

        return kernel

    run = late(find, "an_operator", lambda x: x + 1)
    with pytest.warns(UserWarning, match="an_operator does not run here"):
        assert run(1) == 2
    assert run(2) == 3


def test_under_strict_it_is_an_error() -> None:
    """Where the graph that calls the operator was compiled with ``strict``, and only there."""

    def kernel(x: int) -> int:
        raise CompileError("one_row", None, "out of resource: shared memory")

    run = late(lambda: kernel, "another_operator", lambda x: x + 1)
    program = Program(("a0",), (), [Call("c0", "op", "a0")], ("c0",), {"op": run})
    with pytest.raises(StrictError, match="(?s)another_operator does not run here.*shared memory"):
        guarded(program.compile({}, "t"), strict=True)([1])
    with pytest.warns(UserWarning, match="another_operator does not run here"):
        assert guarded(program.compile({}, "t"))([1]) == (2,)


def test_memory_is_the_callers_matter() -> None:
    def kernel(x: int) -> int:
        raise torch.OutOfMemoryError("no memory")

    with pytest.raises(torch.OutOfMemoryError):
        late(lambda: kernel, "an_operator", lambda x: x)(1)


def test_programs_on_a_gpu_call_kernels_without_the_dispatcher() -> None:
    for name in ("skinny_linear", "decode_attention", "depthwise_conv", "depthwise_cpu"):
        load(name)
    known = torch.ops.fusionc
    assert direct(known.skinny_linear.default._op) is KERNELS["skinny_linear"]
    assert direct(known.depthwise_conv.default._op) is KERNELS["depthwise_conv"]
    assert direct(known.decode_attention_update.default._op) is None, "writes to its arguments"
    assert direct(known.depthwise_cpu.default._op) is None, "has no kernel for CUDA"
    assert direct(torch.ops.aten.add.Tensor._op) is None and direct(torch.float32) is None


def test_a_program_calls_what_it_is_given_instead() -> None:
    p = Program(("a0",), (), [Call("c0", "op_neg", "a0")], ("c0",), {"op_neg": torch.neg})
    x = torch.ones(2)
    assert torch.equal(p.compile({}, "t")([x])[0], -x)
    assert p.compile({}, "t", {"op_neg": lambda t: "other"})([x]) == ("other",)
    assert p.constants["op_neg"] is torch.neg, "what is stored stays"


def test_named_arguments_reach_the_kernel() -> None:
    assert late(lambda: lambda x, y=0: x + y, "an_operator", lambda x, y=0: 0)(1, y=2) == 3
