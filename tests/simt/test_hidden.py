"""Hidden routing's kernels in the emulator: what is asked of them alone."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from helpers import hidden
from helpers.backends import AD102_SHARED, FEW_SMS, HALF
from helpers.hidden import HIDDEN_CASES, HiddenCase, hidden_inputs, wrong_plans
from warpform.ops.reference import hidden as reference

CLASSES = HiddenCase("sorted_classes", 2100, 9, 8, 8, "random", num_classes=4)
by_direction = pytest.mark.parametrize("routed_out", (False, True), ids=("gather", "scatter"))


def test_plan_whatever_the_order_of_threads(simt: Any, seed: int) -> None:
    for case in (CLASSES, hidden.with_kernel(HIDDEN_CASES[0])):
        hidden.check_routing_plan(simt, case)


@by_direction
def test_whatever_the_order_of_threads(simt: Any, seed: int, routed_out: bool) -> None:
    for name in ("topk_64", "classes", "triangular", "four_tokens"):
        case = next(case for case in HIDDEN_CASES if case.name == name)
        hidden.check_hidden(simt, hidden.with_kernel(case), torch.float16, routed_out=routed_out)


@by_direction
def test_partial_sums_of_the_weight_gradient(simt: Any, routed_out: bool) -> None:
    """With more blocks than tiles of the weight the tokens are split, and the parts added."""
    simt.configure(0, 64)
    case = HiddenCase("split", 1300, 4, 16, 24, "topk", num_shared=1)
    hidden.check_hidden(simt, case, torch.bfloat16, routed_out=routed_out)


@by_direction
def test_a_wrong_plan_stays_within_its_tensors(simt: Any, routed_out: bool) -> None:
    """Whatever the plan's tensors hold, the kernels read and write nothing else: the emulator would say so."""
    case = HiddenCase("wrong", 140, 4, 16, 24, "random", num_classes=2)
    x = hidden_inputs(case, torch.bfloat16, routed_out=routed_out)
    for bad in wrong_plans(x.plan(simt)):
        if routed_out:
            simt.hidden_scatter_linear(x.x, x.w, x.gates, x.bias, True, *bad)
        else:
            simt.hidden_gather_linear(x.x, x.w, x.gates, x.bias, *bad)
        simt.hidden_weight_grad(x.x, x.dout, x.gates, routed_out, *bad)


def test_what_has_no_kernel_says_why(simt: Any) -> None:
    x = hidden_inputs(HiddenCase("odd", 9, 4, 12, 24), torch.bfloat16, routed_out=False)
    with pytest.raises(RuntimeError, match="hidden_gather_linear: no kernel: the width of a group is not a multiple"):
        simt.hidden_gather_linear(x.x, x.w, x.gates, None, *x.plan(simt))
    x = hidden_inputs(HiddenCase("tile", 9, 4, 16, 24, tile=64), torch.bfloat16, routed_out=False)
    with pytest.raises(RuntimeError, match="no kernel: the plan's tile is not 128 tokens"):
        simt.hidden_gather_linear(x.x, x.w, x.gates, None, *x.plan(simt))


@by_direction
def test_gpus_with_less_shared_memory(simt: Any, routed_out: bool) -> None:
    """Without gates the products run with 99 KiB a block; with gates, and for the weight's gradient, they refuse."""
    simt.configure(1, FEW_SMS, AD102_SHARED)
    case = HiddenCase("plain", 300, 8, 16, 24, "random", gates=False)
    x = hidden_inputs(case, torch.bfloat16, routed_out=routed_out)
    plan, gates = x.plan(simt), torch.ones(300, 8)
    no_room = "no kernel: these routed products need more shared memory a block than this GPU has"
    if routed_out:
        found, _ = simt.hidden_scatter_linear(x.x, x.w, gates, x.bias, False, *plan)
        expected, _ = reference.hidden_scatter_linear(x.x, x.w, gates, x.bias, False, *plan)
        simt.hidden_scatter_linear_backward(x.dout, None, x.w, None, *plan)
        with pytest.raises(RuntimeError, match=no_room):
            simt.hidden_scatter_linear_backward(x.dout, None, x.w, gates, *plan)
    else:
        found = simt.hidden_gather_linear(x.x, x.w, None, x.bias, *plan)
        expected = reference.hidden_gather_linear(x.x, x.w, None, x.bias, *plan)
        simt.hidden_gather_linear_backward(x.dout, x.x, x.w, gates, *plan)
        with pytest.raises(RuntimeError, match=no_room):
            simt.hidden_gather_linear(x.x, x.w, gates, x.bias, *plan)
    torch.testing.assert_close(found, expected)
    for given in (None, gates):
        with pytest.raises(RuntimeError, match=no_room):
            simt.hidden_weight_grad(x.x, x.dout, given, routed_out, *plan)


def test_bad_arguments(simt: Any) -> None:
    x = hidden_inputs(HiddenCase("plain", 9, 4, 16, 24), torch.bfloat16, routed_out=False)
    plan = x.plan(simt)
    with pytest.raises(RuntimeError, match="gates must be float32 for this x, got bfloat16"):
        simt.hidden_gather_linear(x.x, x.w, x.gates.bfloat16(), None, *plan)
    with pytest.raises(RuntimeError, match=r"w must be bfloat16 as x is, got float32 of shape \[24, 64\]"):
        simt.hidden_gather_linear(x.x, x.w.float(), None, None, *plan)
    with pytest.raises(RuntimeError, match="plan must be of 9 tokens as x is, got one of 8"):
        simt.hidden_gather_linear(x.x, x.w, None, None, plan[0][:8], *plan[1:])
    with pytest.raises(RuntimeError, match="x must come in 4 groups of equal width, got 62"):
        simt.hidden_gather_linear(x.x[:, :62], x.w[:, :62], None, None, *plan)
    with pytest.raises(RuntimeError, match=r"num_groups must be within 1 to 64, got 65"):
        simt.routing_mask(torch.zeros(1, 1, dtype=torch.int64), 65, 0)


def test_kernel_table_lists_what_runs(simt: Any) -> None:
    rows = [row for row in json.loads(simt._kernel_table()) if row["op"].startswith("hidden_")]
    assert {(row["op"], row["dtype"]) for row in rows} >= {
        (f"hidden_{kind}_linear{end}", str(dtype).removeprefix("torch."))
        for kind in ("gather", "scatter")
        for end in ("", "_backward")
        for dtype in HALF
    }
