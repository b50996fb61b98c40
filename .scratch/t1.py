import torch, time, sys
torch.manual_seed(0)
opts={"target":sys.argv[1]} if len(sys.argv)>1 else {}
def check(f,*args,grad=False):
    torch._dynamo.reset()
    t=time.time()
    c=torch.compile(f,backend="fusionc",options=opts)
    out=c(*args); ref=f(*args)
    from fusionc.record import report
    r=report()[-1]
    ok=torch.allclose(out,ref,atol=1e-5,rtol=1e-4,equal_nan=True) if isinstance(out,torch.Tensor) else all(torch.allclose(a,b,atol=1e-5,rtol=1e-4) for a,b in zip(out,ref))
    print(f.__name__, ok, f"{time.time()-t:.2f}s kernels={len(r.kernels)} calls={[ (c.op,c.reason) for c in r.calls]} fb={r.fallbacks}")
    if "-v" in sys.argv: print(r.program)
    return ok
def f1(x,y): return torch.gelu(x) if False else torch.nn.functional.gelu(x)*y+1
def f2(x): return torch.softmax(x,-1)
def f3(x,w): 
    h=x.float(); v=h.pow(2).mean(-1,keepdim=True); return w*(h*torch.rsqrt(v+1e-6)).to(x.dtype)
def f4(x,w,b): return torch.nn.functional.layer_norm(x,(x.shape[-1],),w,b)
def f5(x): return x.sum(), x.sum(0), x.mean(1)
def f6(x): return torch.cat([-x[...,x.shape[-1]//2:], x[...,:x.shape[-1]//2]],-1)*x
def f7(x,i): return torch.nn.functional.embedding(i,x)+1
def f8(x): return x.transpose(0,1).contiguous()+0, torch.cumsum(x,1)
def f9(x,t): return torch.nn.functional.cross_entropy(x,t)
def f10(x,a,b): return torch.relu(x@a)@b+x.sum(1,keepdim=True)
def f11(x): return x.view(4,16,8,16).transpose(1,2).reshape(4,8,256).argmax(-1)
with torch.no_grad():
    torch.set_default_device("cuda"); x=torch.randn(64,128); w=torch.randn(128); b=torch.randn(128)
    check(f1,x,torch.randn(64,128)); check(f2,x); check(f3,x,w); check(f4,x,w,b); check(f5,x); check(f6,x)
    check(f7,torch.randn(50,16),torch.randint(0,50,(4,7))); check(f8,x); check(f9,x,torch.randint(0,128,(64,)))
    check(f10,x,torch.randn(128,32),torch.randn(32,128)); check(f11,torch.randn(4,16,128))
