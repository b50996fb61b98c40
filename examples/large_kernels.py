"""What becomes of large convolution kernels: folded and merged exactly, then, if you allow an error, taken apart.

A small network in the shape of RepLKNet (31×31 beside 5×5, each with its norm) and InceptionNeXt (13×13, then 1×1s). Its
kernels are planted, because random ones cannot be decomposed: smooth (low rank), bands, dense and dilated, two shifted blocks,
and one that is noise. The table has, for each method, what the weights predict, what was measured on a random image (the worst
layer, and the network's result), and the time.

    python examples/large_kernels.py
    python examples/large_kernels.py --errors 0.003 0.03 --plan plan.json    # keeps the last plan
"""

from __future__ import annotations

import argparse
import time
import warnings
from typing import Any

parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
parser.add_argument("--errors", type=float, nargs="+", default=[0.03], help="bounds on any channel's kernel")
parser.add_argument("--methods", nargs="+", default="low_rank inception dilated_sparse shiftwise recursive auto".split())
parser.add_argument("--channels", type=int, default=16)
parser.add_argument("--size", type=int, default=40, help="side of the images in the network")
parser.add_argument("--threads", type=int, default=1, help="one by default: more give other times beside other work")
parser.add_argument("--plan", metavar="FILE", help="write the plan of the last line")


def network(channels: int) -> Any:
    """Five blocks: 31×31 beside 5×5, and four of 13×13."""
    import torch
    from torch import nn

    def planted(kind: str, k: int) -> Any:
        at = (torch.arange(k) - k // 2).float()
        noise = torch.randn(channels, 1, k, k)
        if kind == "smooth":
            bell = torch.exp(-(at**2) / (torch.rand(3, channels, 1, 1) + 0.2) / k**2 * 8)
            made = (bell.unsqueeze(-1) * bell.flip(0).unsqueeze(-2) * torch.randn(3, channels, 1, 1, 1)).sum(0)
        else:
            mask = (at.abs()[:, None] < 2) & (at.abs() < 2)
            if kind == "bands":
                mask |= (at == 0) | (at == 0)[:, None]
            elif kind == "dilated":
                mask |= (at % 6 == 0) & (at % 6 == 0)[:, None]
            elif kind == "blocks":
                mask |= (at < -4) & (at > 4)[:, None]
            made = noise * (mask if kind != "noise" else 1)
        made = made + 3e-3 * noise * made.square().mean((2, 3), keepdim=True).sqrt()
        return made / made.square().sum((2, 3), keepdim=True).sqrt()

    class Block(nn.Module):
        def __init__(self, kind: str, sides: tuple[int, ...]) -> None:
            super().__init__()
            convs = [nn.Conv2d(channels, channels, k, padding=k // 2, groups=channels, bias=False) for k in sides]
            self.large = nn.ModuleList(convs)
            self.norms = nn.ModuleList(nn.BatchNorm2d(channels) for _ in sides)
            self.mlp = nn.Sequential(nn.Conv2d(channels, 2 * channels, 1), nn.GELU(), nn.Conv2d(2 * channels, channels, 1))
            self.large[0].weight.data.copy_(planted(kind, sides[0]))

        def forward(self, x: Any) -> Any:
            y = self.norms[0](self.large[0](x))
            for conv, norm in zip(self.large[1:], self.norms[1:]):
                y = y + norm(conv(x))
            return x + self.mlp(y)

    blocks = [("smooth", (31, 5)), *((kind, (13,)) for kind in ("bands", "dilated", "blocks", "noise"))]
    return nn.Sequential(*(Block(*b) for b in blocks), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10)).eval()


def main(argv: list[str] | None = None) -> dict[str, dict[str, float]]:
    """Print the tables; return {"method bound": {"layers", "predicted", "measured", "result", "ms"}}."""
    args = parser.parse_args(argv)
    import torch
    from rich.console import Console
    from rich.table import Table

    import fusionc
    from fusionc.errors import FallbackWarning

    warnings.simplefilter("ignore", FallbackWarning)  # "unverified": the table below is the verification
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    console, model = Console(width=120), network(args.channels)
    x = torch.randn(1, args.channels, args.size, args.size)
    results: dict[str, dict[str, float]] = {}
    times: dict[Any, float] = {}

    def timed(call: Any) -> float:
        spent = []
        for _ in range(4):
            start = time.perf_counter()
            call(x)
            spent.append(time.perf_counter() - start)
        return 1e3 * min(spent)

    def compiled(**options: Any) -> Any:
        torch.compiler.reset()
        f = torch.compile(model, backend="fusionc", options={"cache": False, **options})
        f(x)
        return f

    with torch.no_grad():
        f, eager = compiled(), timed(model)
        exact = timed(f)
        passes = [p for p in fusionc.report()[-1].passes if p.fired]
        calls = sum("conv" in c.op for c in fusionc.report()[-1].calls)
        before = sum(isinstance(m, torch.nn.Conv2d) for m in model.modules())
        console.print(f"exact: {', '.join(f'{p.name} ×{p.fired}' for p in passes)}; {calls} of {before} convolutions are left, "
                      f"{exact:.1f} ms (eager {eager:.1f})")  # fmt: skip
        table = Table("method", "bound", "layers", "predicted", "measured", "result", "ms", "speed", "layers become")
        for error in args.errors:
            for method in args.methods:
                torch.compiler.reset()
                report = fusionc.plan_large_kernels(model, {"method": method, "error": error}, calibration=[x])
                forms = tuple((e.layer, e.form) for e in report.plan.entries)
                if forms not in times:
                    times[forms] = timed(compiled(large_kernel=report.plan)) if forms else exact
                worst = max((e.score for e in report.plan.entries), default=0.0)
                change = max((c.relative_l2 for c in report.changes.values()), default=0.0)
                row = {"layers": len(report.changes), "predicted": worst, "measured": change,
                       "result": report.agreement.relative_l2, "ms": times[forms]}  # fmt: skip
                results[f"{method} {error:g}"] = row
                became = "\n".join(f"{e.layer}: {e.form}" for e in report.plan.entries) or "all stay exact"
                table.add_row(method, f"{error:g}", f"{row['layers']} of {report.plan.total}", f"{worst:.2g}", f"{change:.2g}",
                              f"{row['result']:.2g}", f"{row['ms']:.1f}", f"{exact / row['ms']:.2f}×", became)  # fmt: skip
    console.print(table)
    console.print(str(report), highlight=False)
    if args.plan:
        report.plan.save(args.plan)
    return results


if __name__ == "__main__":
    main()
