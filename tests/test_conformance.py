"""How tests/conformance gives tests to backends, and that no op is without one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from helpers import backends
from helpers.backends import Backend, drawn_on, kernels, on, reference
from warpform.cli import self_test

REFERENCE = reference((torch.float32, torch.float64), examples=3)
SIMT, GPU = kernels((torch.float16,), has_kernel=lambda case: case % 8 == 0, examples=(2, 4))


def test_every_op_has_a_suite() -> None:
    suites = "".join(path.read_text() for path in (Path(__file__).parent / "conformance").glob("test_*.py"))
    ops = {op for family in self_test.families().values() for op in family}
    assert not {op for op in ops if op not in suites}


def test_a_test_is_given_to_each_backend_with_its_cases_and_dtypes() -> None:
    @on(REFERENCE, SIMT, GPU, case=(7, 8))
    def test(backend: Backend, case: int, dtype: torch.dtype) -> None: ...

    (mark,) = test.pytestmark  # type: ignore[attr-defined]
    names, rows = mark.args
    assert names == ["backend", "case", "dtype"]
    assert {row.id: [mark.name for mark in row.marks] for row in rows} == {
        "reference-7-float32": [],
        "reference-7-float64": ["slow"],
        "reference-8-float32": ["slow"],
        "reference-8-float64": [],
        "simt-8-float16": ["simt"],
        "gpu-8-float16": ["gpu"],
    }
    assert [row.values[0] for row in rows[-2:]] == [SIMT, GPU]


def test_a_drawn_test_draws_for_its_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "true")  # where all examples are drawn
    count = dict.fromkeys(("reference", "simt", "gpu"), 0)

    @drawn_on(REFERENCE, SIMT, GPU, case=lambda backend: backends.st.just(8 if backend is SIMT else 7))
    def test(backend: Backend, case: int, dtype: torch.dtype, seed: int) -> None:
        assert case == (8 if backend is SIMT else 7) and torch.initial_seed() == seed
        assert dtype in backend.dtypes
        count[backend.name] += 1

    for backend in (REFERENCE, SIMT, GPU):
        test(backend)
    assert count == {"reference": 3, "simt": 2, "gpu": 4}


def test_results_that_differ_are_found() -> None:
    state = torch.zeros(2)
    with pytest.raises(AssertionError, match="result 0 differs"):
        REFERENCE.assert_repeats(lambda: [state.add_(1).clone()])
    assert REFERENCE.assert_repeats(lambda: [state])[0] is state


def test_machines_are_the_emulators_alone() -> None:
    assert len(list(REFERENCE.machines((0, 1), (1, 1024)))) == 1
    REFERENCE.configure(0, 1)
