import torch, time, sys
from transformers import LlamaConfig, LlamaForCausalLM
torch.manual_seed(0); torch.set_default_device("cuda")
L=int(sys.argv[1]) if len(sys.argv)>1 else 2
cfg=LlamaConfig(hidden_size=64,intermediate_size=128,num_hidden_layers=L,num_attention_heads=4,num_key_value_heads=2,vocab_size=100,max_position_embeddings=64)
m=LlamaForCausalLM(cfg).eval()
ids=torch.randint(0,100,(2,32))
with torch.no_grad():
    ref=m(ids,use_cache=False).logits
    t=time.time()
    c=torch.compile(m,backend="fusionc")
    out=c(ids,use_cache=False).logits
    print("fwd", (out-ref).abs().max(), time.time()-t)
from fusionc.record import report
r=report()[-1]
print(r.timings, len(r.kernels), len(r.groups), [(c.op,c.reason) for c in r.calls if c.reason], r.fallbacks)
import collections
print(collections.Counter(c.op for c in r.calls))
for g in r.groups[:24]: print(g.kind, g.nodes, '->', g.outputs)
torch._dynamo.reset()
m.train()
c=torch.compile(m,backend="fusionc")
t=time.time()
loss=c(ids,labels=ids,use_cache=False).loss; loss.backward(); print('train', time.time()-t)
g1=[p.grad.clone() for p in m.parameters()]; m.zero_grad()
l2=m(ids,labels=ids,use_cache=False).loss; l2.backward()
print(loss.item(),l2.item(), max((a-p.grad).abs().max().item() for a,p in zip(g1,m.parameters())))
for r in report()[-2:]:
    print(r.stage, {k:round(v,3) for k,v in r.timings.items()}, len(r.kernels), len(r.groups), [(c.op,c.reason) for c in r.calls if c.reason], r.fallbacks)
    print(collections.Counter(c.op for c in r.calls))
