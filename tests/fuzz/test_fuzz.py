"""The fuzzer in CI: fixed programs for about a minute, and every program that ever failed."""

from __future__ import annotations

import importlib.util
import os
import time
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz.choose import from_draw, from_seed
from tests.fuzz.generate import CORPUS, check, grow, load, reduce, verdict
from tests.fuzz.program import Program, parse
from tests.fuzz.rules import OPS, RULES
from tests.sweeps.backends import Counting, prepared

BUDGET = float(os.environ.get("FUSIONC_FUZZ_SECONDS", "45"))
LEAST = 20
EXAMPLES = int(os.environ.get("FUSIONC_FUZZ_EXAMPLES", "150"))
NEEDS_BACKEND = pytest.mark.skipif(
    importlib.util.find_spec("fusionc.backend") is None, reason="the backend does not exist yet"
)


@NEEDS_BACKEND
def test_random_programs() -> None:
    """Hypothesis draws the same programs each time (derandomize) and shrinks what fails.

    Past the time budget, once a least number was judged however slow the machine is, unknown programs pass unseen, while
    known verdicts are repeated, so that shrinking ends and hypothesis still sees a stable answer.
    """
    begin = time.monotonic()
    verdicts: dict[str, str | None] = {}

    @settings(
        max_examples=EXAMPLES,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        print_blob=False,
    )
    @given(st.composite(lambda draw: grow(from_draw(draw)))())
    def every_program_is_as_good_as_eager(program: Program) -> None:
        text = program.text()
        if text not in verdicts:
            if len(verdicts) >= LEAST and time.monotonic() - begin > BUDGET:
                return
            verdicts[text] = verdict(program, Counting("fusionc"))
        problem = verdicts[text]
        assert problem is None, f"{problem}\nkeep this as tests/fuzz/corpus/NAME.graph:\n{text}"

    with prepared("fusionc"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        every_program_is_as_good_as_eager()
    assert len(verdicts) >= LEAST, "too few programs"


@NEEDS_BACKEND
@pytest.mark.parametrize("path", sorted(CORPUS.glob("*.graph")), ids=lambda p: p.stem)
def test_corpus(path: Path) -> None:
    with prepared("fusionc"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert check(load(path), Counting("fusionc")) is None


def test_programs_print_parse_and_repeat() -> None:
    seen: set[str] = set()
    for seed in range(150):
        program = grow(from_seed(seed))
        text = program.text()
        assert parse(text, OPS) == program
        assert grow(from_seed(seed)) == program
        for made, again in zip(program.make(), program.make(), strict=True):
            assert made.stride() == again.stride()
            assert torch.equal(torch.nan_to_num(made.detach()), torch.nan_to_num(again.detach()))
        seen.update(step.op for step in program.steps)
    assert len(seen) > 0.7 * len(RULES), f"rules that never fire: {sorted(RULES.keys() - seen)}"


@pytest.mark.parametrize(
    "text",
    [
        "in x0 float99 [2] contiguous normal 0\nout x0",
        "in X float32 [2] contiguous normal 0\nout X",
        "in x0 float32 [2] contiguous normal 0\nt0 = __import__ x0 {}\nout t0",
        "t0 = exp x0 {}\nout t0",
        "in x0 float32 [2] contiguous normal 0\nt0 = exp x0 {oops}\nout t0",
        "what",
    ],
)
def test_malformed_programs_are_refused_with_their_line(text: str) -> None:
    with pytest.raises(ValueError, match=r"line \d of a fuzz program"):
        parse(text, OPS)


def test_a_wrong_backend_is_found_and_its_program_reduced() -> None:
    def forgets_negation(gm: torch.fx.GraphModule, example_inputs: list[object]) -> object:
        for node in gm.graph.nodes:
            if node.target is torch.neg:
                node.replace_all_uses_with(node.args[0])
        gm.recompile()
        return gm.forward

    text = """
        in x0 float32 [3, 7] transposed normal 1
        in x1 float32 [7] offset normal 2
        t0 = exp x0 {}
        t1 = neg t0 {}
        t2 = add t1 x1 {}
        t3 = sum t2 {"dim": 1, "keepdim": true}
        t4 = tanh x1 {}
        out t3 t4
        dynamic
    """
    with prepared("eager"):
        program = parse(text, OPS)
        assert check(program, "eager") is None
        assert "eager's" in (check(program, forgets_negation) or "")
        small = reduce(program, lambda p: check(p, forgets_negation) is not None)
    assert [step.op for step in small.steps] == ["neg"]
    assert len(small.inputs) == 1
    assert not small.dynamic
