"""Plans of Triton kernels by measurement: which kernels are worth it, their candidates' race, and the cache of winners.

Only kernels that cost the graph time are tuned: those whose bytes alone take long enough, uses counted, or that are a
good part of all bytes.  Their candidates (`schedule/space.py`) compile beside the other kernels in the same threads;
then each kernel's race is run on random data of its own (zeros for integers, which may be used as indices), and a
winner must give the rule's results before it is taken.  Winners are kept in the cache as JSON, keyed by the kernel's
digest, sizes, device and versions, so that the next process measures nothing.

Everything has a deadline, and every failure leaves the rule's plan: tuning may cost seconds, never a model.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from ..codegen import triton as codegen
from ..ir.loop import Kernel, evaluate, kernel_bytes
from ..progress import progress
from ..runtime import launch, tune
from ..runtime.environment import environment_key, source_fingerprint
from ..schedule import space
from ..schedule.plan import Plan

if TYPE_CHECKING:
    from ..compiler import Context
    from .triton import Part

KIND = "plan"


@dataclass(frozen=True)
class Effort:
    """How much to spend on one graph: candidates of a kernel and of all, and seconds; and for which kernels.

    `kernel_us` is the least time that one launch's bytes take, `graph_us` that of all uses.  Kernels below 2 µs are as
    fast as their launch by rule (measured: GPT-2's at one sentence gained nothing in 2 s of tuning).
    """

    most: int
    total: int
    seconds: float
    kernel_us: float
    graph_us: float


EFFORT = {"default": Effort(8, 24, 3.0, 2.0, 20.0), "max": Effort(24, 400, 30.0, 0.0, 5.0)}
_SHARE = 0.1  # of the graph's bytes: worth tuning whatever the time
_TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
_CHUNK = 1 << 25  # elements that are compared at a time


@dataclass
class Entry:
    """One kernel to tune: `kernels[0]` is the rule's; None where a candidate was not built."""

    part: Part
    hints: dict[str, int]
    plans: list[Plan]
    weight: float
    kernels: list[launch.TritonKernel | None] = field(default_factory=list)
    tried: list[tuple[str, float | None]] = field(default_factory=list)


class Session:
    """The tuning of one graph's kernels: `consider`, then compile `jobs` with everything else, then `measure`.

    `uses` says how often each symbol runs; None: take plans from the cache only (a warm start).
    """

    def __init__(self, cx: Context, device: Any, uses: Mapping[str, int] | None, rig: Rig | None = None) -> None:
        self.cx, self.device, self.uses = cx, device, uses
        self.level = cx.config.tune
        self.effort = EFFORT.get(self.level)
        self.entries: list[Entry] = []
        self.tuning: dict[
            str, list[tuple[str, float | None, float | None]]
        ] = {}  # by the part's symbol, for the record
        self.rules: dict[str, Plan] = {}  # of parts whose plan came from the cache
        self.rig = rig or Rig(cx.device, getattr(device, "cache", 50 << 20))
        self._cut = 0.0  # when compiling candidates ends; set when the first one starts that has the processor to itself

    # -- which --------------------------------------------------------------------------------------------------------
    def consider(self, parts: Sequence[Part]) -> None:
        """Give parts the plans that the cache has for them, and pick those of the rest that are to be measured."""
        if self.effort is None:
            return
        measures = self.uses is not None and not self.rig.recording()
        fresh: list[Entry] = []
        hints = [{s.name: self.cx.hints.get(s.name, 64) for s in p.kernel.sizes} for p in parts]
        moved = [sum(kernel_bytes(p.kernel, h)) for p, h in zip(parts, hints, strict=True)]
        for p, h, n in zip(parts, hints, moved, strict=True):
            if self._recall(p, h) or not measures or self.uses is None or not n or not all(h.values()):
                continue
            uses = self.uses.get(p.symbol.split("_part")[0], 1)
            us = space.lower_bound(p.kernel, h, self.device)
            if us >= self.effort.kernel_us and (us * uses >= self.effort.graph_us or n * uses >= _SHARE * sum(moved)):
                fresh.append(Entry(p, h, [], us * uses))
        fresh.sort(key=lambda e: (-e.weight, e.part.symbol))
        left = self.effort.total
        for e in fresh:
            found = space.candidates(e.part.kernel, e.part.plan, e.hints, self.device, self.effort.most)
            e.plans = [found[0], *(q for q in found[1:] if codegen.refusal(e.part.kernel, q) is None)][: left + 1]
            left -= len(e.plans) - 1
        self.entries = fresh

    def jobs(self) -> list[Callable[[], Any]]:
        """Compile jobs of the candidates beside the rules' plans, the likeliest first; they give up when time is out."""
        ranked = [(i, e) for e in self.entries for i in range(1, len(e.plans))]
        ranked.sort(key=lambda r: r[0])
        for e in self.entries:
            e.kernels = [None] * len(e.plans)
        return [partial(self._build, e, i) for i, e in ranked]

    def _build(self, e: Entry, i: int) -> None:
        assert self.effort is not None
        now = time.monotonic()
        if not self._cut and (self.cx.waiting is None or self.cx.waiting.done):  # operators' kernels take turns with these
            self._cut = now + 0.6 * self.effort.seconds
        if self._cut and now > self._cut:
            return
        p = e.part
        made = self.rig.kernel(codegen.render(p.kernel, e.plans[i], p.symbol), p, e.plans[i])
        made.compile()
        e.kernels[i] = made

    # -- measuring ----------------------------------------------------------------------------------------------------
    def measure(self, bound: dict[str, launch.TritonKernel], setting: bool | str = "auto") -> None:
        """Race each kernel's candidates; winners replace the part's plan and text and its kernel in `bound`."""
        if not self.entries or self.effort is None:
            return
        deadline = time.monotonic() + 0.4 * self.effort.seconds
        with (
            _no_modes(),
            self.rig.here(),
            torch.no_grad(),
            progress("measuring plans", len(self.entries), setting) as bar,
        ):
            for e in self.entries:
                rule = bound.get(e.part.symbol)
                try:
                    if rule is not None and time.monotonic() < deadline:
                        self._one(e, rule, bound, deadline)
                except Exception:  # noqa: BLE001 - out of memory, say: the rule's plan stays
                    e.tried = []
                self._keep(e)
                bar.advance(e.part.symbol)
            self.rig.close()

    def _one(self, e: Entry, rule: launch.TritonKernel, bound: dict[str, launch.TritonKernel], deadline: float) -> None:
        e.kernels[0] = rule
        spills = rule.compile().spills
        alive = [i for i, k in enumerate(e.kernels) if k is not None and (i == 0 or k.compile().spills <= spills)]
        if len(alive) < 2:
            return
        order, ms = self.rig.race(e, alive, deadline)
        e.tried = [(p.to_json(), round(ms[i] * 1e3, 3) if i in ms else None) for i, p in enumerate(e.plans)]
        for i in order:
            if i == 0:
                return
            winner = e.kernels[i]
            if winner is not None and self.rig.agrees(e, rule, winner):
                e.part.plan, e.part.source = e.plans[i], winner.source
                bound[e.part.symbol] = winner
                return

    def _keep(self, e: Entry) -> None:
        """Write the decision down; also that there was no time, so that the next process does not try again."""
        predicted = {p.to_json(): space.estimate(e.part.kernel, p, e.hints, self.device) for p in e.plans}
        self.tuning[e.part.symbol] = [(t, float(f"{predicted[t]:.3g}"), us) for t, us in e.tried]
        with contextlib.suppress(TypeError, ValueError):
            key = self._key(e.part.kernel, e.plans[0], e.hints)
            self._cache().put(KIND, key, {"plan": asdict(e.part.plan), "tried": [list(t) for t in e.tried]})

    # -- the cache ----------------------------------------------------------------------------------------------------
    def _cache(self) -> Any:
        from .cpp import cache_for

        return cache_for(self.cx.config.cache)

    def _key(self, kernel: Kernel, rule: Plan, hints: Mapping[str, int]) -> dict[str, Any]:
        return {
            "space": space.VERSION,
            "kernel": kernel.digest,
            "sizes": dict(sorted(hints.items())),
            "rule": rule.to_json(),
            "level": self.level,
            "environment": environment_key(self.rig.where),
            "source": source_fingerprint(),
        }

    def _recall(self, p: Part, hints: dict[str, int]) -> bool:
        """Use the cache's plan for this part; False if it has none that makes sense."""
        try:
            payload = self._cache().get(KIND, self._key(p.kernel, p.plan, hints))
            if payload is None:
                return False
            plan, tried = Plan.from_dict(payload["plan"]), _checked(payload["tried"])
            if plan != p.plan:
                if not space.legal(plan) or codegen.refusal(p.kernel, plan) is not None:
                    return False
                source = codegen.render(p.kernel, plan, p.symbol)
                self.rules[p.symbol] = p.plan
                p.plan, p.source = plan, source
        except Exception:  # noqa: BLE001 - any trouble is a miss
            return False
        self.tuning[p.symbol] = [
            (q.to_json(), float(f"{space.estimate(p.kernel, q, hints, self.device):.3g}"), us) for q, us in tried
        ]
        return True

    def restore(self, p: Part) -> None:
        """Go back to the rule's plan: the cached one did not build."""
        p.plan = self.rules.pop(p.symbol)
        p.source = codegen.render(p.kernel, p.plan, p.symbol)


def _checked(tried: Any) -> list[tuple[Plan, float | None]]:
    """The list of tried plans of an entry.  Raises for anything else."""
    import json

    out = []
    for text, us in tried:
        if us is not None and type(us) is not float:
            raise ValueError("a time must be a float or null")
        out.append((Plan.from_dict(json.loads(text)), us))
    return out


def _no_modes() -> contextlib.AbstractContextManager[Any]:
    """Real tensors are made here, while AOTAutograd has its fake ones in force."""
    return torch.utils._python_dispatch._disable_current_modes()  # type: ignore[no-any-return]


class Rig:
    """What touches the device: kernels, data for them, and times."""

    def __init__(self, device: torch.device, l2: int) -> None:
        self.device, self.l2 = device, l2
        self.where = str(device)
        self._store: torch.Tensor | None = None

    def here(self) -> contextlib.AbstractContextManager[Any]:
        return torch.cuda.device(self.device)

    def recording(self) -> bool:
        """Is the caller recording a CUDA graph?  Waiting for the device would end that."""
        return self.device.type == "cuda" and torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()

    def kernel(self, source: str, p: Part, plan: Plan) -> launch.TritonKernel:
        return launch.TritonKernel(source, p.symbol, p.kernel, plan, self.device)

    def race(self, e: Entry, alive: Sequence[int], deadline: float) -> tuple[list[int], dict[int, float]]:
        data = self.data(e)
        self.fill(e, data)
        args = [t.data_ptr() if isinstance(t, torch.Tensor) else t for t in data]
        launches: list[Callable[[], Any]] = [_never] * len(e.kernels)
        for i in alive:
            k = e.kernels[i]
            assert k is not None
            launches[i] = partial(k.launch, args, e.hints)
            launches[i]()
        bytes_moved = sum(kernel_bytes(e.part.kernel, e.hints))
        # what fits into a part of L2 is found there in a model, too: its producer has just run
        cold = bytes_moved > self.l2 // 4
        us = bytes_moved / 4e6
        sampler = tune.cuda_sampler(launches, self.device, cold=cold, repeat=1 if us > 10 else 10)
        return tune.race(alive, sampler, deadline=deadline, rounds=(3, 9, 27) if us < 100 else (3, 6, 9))

    def agrees(self, e: Entry, rule: launch.TritonKernel, other: launch.TritonKernel) -> bool:
        """Do both give the same results, up to rounding, into outputs that held something else?"""
        data = self.data(e)
        outputs = [t for t, b in zip(data, e.part.kernel.buffers, strict=True) if b.kind != "in"]
        kept: list[torch.Tensor] = []
        for k in (rule, other):
            self.fill(e, data)
            k.launch(data, e.hints)
            if k is rule:
                kept = [t.clone() for t in outputs]
        return all(same(a, b) for a, b in zip(outputs, kept, strict=True))

    def data(self, e: Entry) -> list[Any]:
        """A tensor for each buffer, all in one allocation that is kept for the next kernel; numbers for scalars."""
        from ..ir.lowering.registry import TORCH_DTYPE

        places, total = [], 0
        for b in e.part.kernel.buffers:
            n = 0 if b.scalar else evaluate(b.size, e.hints)
            dtype = TORCH_DTYPE[b.dtype]
            places.append((total, n * dtype.itemsize, dtype))
            total += -(-n * dtype.itemsize // 512) * 512 + 512
        if self._store is None or self._store.numel() < total:
            self._store = None
            self._store = torch.empty(total, dtype=torch.uint8, device=self.device)
        store = self._store
        return [
            (1.0 if dtype.is_floating_point else 1) if b.scalar else store[at : at + n].view(dtype)
            for (at, n, dtype), b in zip(places, e.part.kernel.buffers, strict=True)
        ]

    def fill(self, e: Entry, data: Iterable[Any]) -> None:
        """Normal floats, zero integers (they may be indices), random booleans; outputs hold NaN or -1."""
        random = torch.Generator(self.device).manual_seed(0)
        for t, b in zip(data, e.part.kernel.buffers, strict=True):
            if b.scalar:
                continue
            if b.kind == "out":
                t.view(torch.uint8).fill_(0 if t.dtype == torch.bool else 255)
            elif t.dtype.is_floating_point:
                t.normal_(generator=random)
            elif t.dtype == torch.bool:
                t.view(torch.uint8).random_(0, 2, generator=random)
            else:
                t.zero_()

    def close(self) -> None:
        self._store = None


def _never() -> None:
    raise AssertionError("a kernel that was not built")


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal up to the rounding of their dtype, on the scale of the whole tensor; NaN and infinities in the same places."""
    tolerance = _TOLERANCE.get(a.dtype)
    for x, y in zip(a.split(_CHUNK), b.split(_CHUNK), strict=True):
        if torch.equal(x.view(torch.uint8), y.view(torch.uint8)):
            continue
        if tolerance is None:
            return False
        x, y = x.double(), y.double()
        finite = y.isfinite()
        if not torch.equal(x[~finite].nan_to_num(7.0), y[~finite].nan_to_num(7.0)):
            return False
        x, y = x[finite], y[finite]
        scale = y.abs().clamp(min=float(y.square().mean().sqrt()))
        if not bool(((x - y).abs() <= tolerance * scale).all()):
            return False
    return True
