import sys, time, torch, triton
sys.path.insert(0, ".")
from dataclasses import replace
from tests.codegen import kernels as K
from fusionc.codegen.triton import render
from fusionc.ir.loop import evaluate, kernel_bytes
from fusionc.ir.interp import TORCH_DTYPE
from fusionc.runtime.launch import TritonKernel, compile_many, grid_of
from fusionc.runtime.device import properties
from fusionc.schedule.plan import Plan
from fusionc.schedule.rules_triton import default_plan
from fusionc.schedule.split import split, should_split
dev = properties(); print(dev, flush=True)
def bufs(k, sizes):
    out = {}
    for b in k.buffers:
        n = evaluate(b.size, sizes); dt = TORCH_DTYPE[b.dtype]
        out[b.name] = torch.randn(n, device="cuda").to(dt) if dt.is_floating_point else torch.zeros(n, dtype=dt, device="cuda")
    return out
def bench(f):
    return triton.testing.do_bench(f, warmup=10, rep=40, return_mode="median") * 1e3
def show(name, us, nbytes, extra=""):
    print(f"{name:42s} {us:9.1f} us {nbytes/us/1e3:8.0f} GB/s  {extra}", flush=True)
def one(case, plans=(), eager=None):
    k = case.kernel
    t = bufs(k, case.sizes); nb = sum(kernel_bytes(k, case.sizes))
    base = default_plan(k, case.sizes, dev)
    args = [t[b.name] for b in k.buffers]
    for p in [base, *plans]:
        try:
            tk = TritonKernel(render(k, p, "k0"), "k0", k, p); c = tk.compile()
            tk.launch(args, case.sizes)
            show(case.name, bench(lambda: tk.launch(args, case.sizes)), nb, f"x{p.xblock} r{p.rblock} w{p.warps} regs {c.registers} spill {c.spills}" + (" *" if p is base else ""))
        except Exception as e: print(case.name, p, str(e)[:200])
    if eager: show("   eager", bench(lambda: eager(t)), nb)
P = lambda x, r, w: Plan("triton", xblock=x, rblock=r, warps=w)
# launch overhead
c = K.pointwise(1024, "f32"); k = c.kernel; p = default_plan(k, {}, dev)
tk = TritonKernel(render(k, p, "k0"), "k0", k, p); a = [torch.randn(1024, device="cuda") for _ in range(3)]
f = tk.bind(grid_of(k, p, {})); ptr = [x.data_ptr() for x in a]; s = torch.cuda.current_stream().cuda_stream
for name, g in (("launch()", lambda: tk.launch(a)), ("bind()", lambda: f(s, *ptr)), ("torch.add", lambda: torch.add(a[0], a[1], out=a[2]))):
    for _ in range(100): g()
    torch.cuda.synchronize(); t0 = time.perf_counter()
    for _ in range(2000): g()
    t1 = time.perf_counter(); torch.cuda.synchronize(); print(name, (t1 - t0) / 2000 * 1e6, "us", flush=True)
c = K.rmsnorm(64); k = c.kernel; p = default_plan(k, c.sizes, dev); tk = TritonKernel(render(k, p, "k0"), "k0", k, p); a2 = [t.cuda() for t in c.inputs().values()]
g = lambda: tk.launch(a2, c.sizes)
for _ in range(100): g()
t0 = time.perf_counter()
for _ in range(2000): g()
print("dynamic launch()", (time.perf_counter() - t0) / 2000 * 1e6, "us"); torch.cuda.synchronize()
for n in (64, 768, 4096, 8192, 16384, 32768, 65536, 50304):
    rows = (1 << 26) // n
    one(K.softmax(rows, n, "bf16"), [P(1,0,8), P(1,0,16)] if 2000 < n < 20000 else [P(1,4096,16),P(1,8192,16),P(1,8192,32),P(1,16384,32)] if n > 20000 else [P(4,0,4), P(32,0,4)], lambda t: torch.softmax(t["in0"].view(rows, n), -1))
for n in (768, 2048, 8192):
    rows = (1 << 25) // n
    one(K.layernorm(rows, n, "bf16"))
one(K.layernorm(512, 768, "bf16"), [P(1,0,4), P(1,0,2)])
one(K.softmax(64, 50304, "f32"), [P(1,8192,32), P(1,4096,16), P(1,4096,8)], lambda t: torch.softmax(t["in0"].view(64, 50304), -1))
one(K.rmsnorm(4096, 8192, "bf16"))
one(K.column_sum(8192, 8192, "bf16"), [P(16,128,8),P(32,128,8),P(32,32,4)])
one(K.multi_axis(64, 64, 3136), [P(1,2048,8), P(1,1024,4)])
for case, eager in ((K.full("sum", 1 << 26), lambda t: t["in0"].sum()), (K.column_sum(65536, 1024, "bf16"), lambda t: t["in0"].view(65536, 1024).sum(0)), (K.column_sum(1<<20, 32), lambda t: t["in0"].view(1<<20, 32).sum(0))):
    nb = sum(kernel_bytes(case.kernel, {})); base = should_split(case.kernel, {}, "triton", dev.processors)
    t0 = bufs(case.kernel, {})
    for parts in sorted({base, 64, 256, 512, 1024}):
        pair = split(case.kernel, parts); t = dict(t0); tks = []
        for k in pair:
            for b in k.buffers:
                if b.name not in t: t[b.name] = torch.zeros(evaluate(b.size, {}), dtype=TORCH_DTYPE[b.dtype], device="cuda")
            p = default_plan(k, {}, dev); tks.append((TritonKernel(render(k, p, "k0"), "k0", k, p), [t[b.name] for b in k.buffers], p))
        def go():
            for tk, args, _ in tks: tk.launch(args)
        go(); show(f"{case.name} split {parts}", bench(go), nb, str([(p.xblock, p.rblock, p.warps) for _, _, p in tks]) + (" *" if parts == base else ""))
    show("   eager", bench(lambda: eager(t)), nb)
sys.exit()
cs = [K.softmax(128 + i, 1000 + i) for i in range(16)]
for w in (1, 8, 16):
    t0 = time.perf_counter()
    def job(c):
        p = replace(default_plan(c.kernel, {}, dev), warps=w if w < 16 else 16); return TritonKernel(render(c.kernel, p, "k0"), "k0", c.kernel, p).compile()
    r = compile_many([lambda c=c: job(c) for c in cs], w); print("compile 16 kernels", w, "threads", time.perf_counter() - t0, [x for x in r if isinstance(x, Exception)][:1], flush=True)
