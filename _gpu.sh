# seconds: 60
cat > /tmp/c3gpu.py <<'PY'
import torch, time, triton, sys, warnings
warnings.simplefilter("ignore")
from torch import nn
import fusionc
dev="cuda"; N,C,H=32,256,56
T0=time.time()
def bench(f): return triton.testing.do_bench(f,warmup=5,rep=25,return_mode="median")*1e3
class B(nn.Module):
    def __init__(s,r):
        super().__init__(); s.c=nn.Conv2d(C,C,31,padding=15,groups=C); s.n=nn.BatchNorm2d(C)
        with torch.no_grad(): s.c.weight.copy_(sum(torch.randn(C,1,31,1)*torch.randn(C,1,1,31) for _ in range(r))/30/r**.5)
    def forward(s,x): return nn.functional.gelu(s.n(s.c(x)))
for r,fmt,dt in ((1,torch.channels_last,torch.bfloat16),(1,torch.contiguous_format,torch.bfloat16),(2,torch.contiguous_format,torch.float32)):
    x=torch.randn(N,C,H,H,device=dev,dtype=dt).contiguous(memory_format=fmt)
    m=B(r).eval().to(dev).to(dt)
    with torch.no_grad():
        import copy
        ref=copy.deepcopy(m).double().cpu()(x[:1].double().cpu()); e=lambda y: ((y[:1].double().cpu()-ref).norm()/ref.norm()).item()
        out=[]
        for opt in ({}, {"large_kernel":{"method":"low_rank","error":2e-2}}):
            torch._dynamo.reset(); f=torch.compile(m,backend="fusionc",options=opt); y=f(x); out+= [f"{bench(lambda:f(x)):.0f} us err {e(y):.2e}"]
        rec=[p for p in fusionc.report()[-1].passes if p.name=="large_kernel"][0]
        print(f"rank {r} {fmt} {dt}: exact / option {out}; eager err {e(m(x)):.2e}; fired {rec.fired} {[q.reason[:150] for q in rec.refusals]} at {time.time()-T0:.0f} s",flush=True)
import torch.nn.functional as F
for C1,L,K in ((256,8192,512),(256,4096,64),(256,2048,2048),(64,8192,8192)):
    a=torch.randn(4,C1,L,device=dev); w=torch.randn(C1,1,K,device=dev)/K**.5; n=1<<(L+K-2).bit_length()
    def fft(): return torch.fft.irfft(torch.fft.rfft(a,n)*torch.fft.rfft(w.squeeze(1).flip(-1),n),n)[...,:L]
    d=lambda: F.conv1d(a,w,None,1,K-1,1,C1)[...,:L]
    ref=torch.fft.irfft(torch.fft.rfft(a.double(),n)*torch.fft.rfft(w.double().squeeze(1).flip(-1),n),n)[...,:L]
    e=lambda y: ((y.double()-ref).norm()/ref.norm()).item()
    print("1d",C1,L,K,f"fft {bench(fft):.0f} err {e(fft()):.1e} direct {bench(d):.0f} err {e(d()):.1e} at {time.time()-T0:.0f} s",flush=True)
PY
timeout 80 python3 /tmp/c3gpu.py 2>&1 | tail -60
