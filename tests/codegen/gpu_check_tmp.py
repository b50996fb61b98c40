import sys, traceback, types
sys.path.insert(0, ".")
try:
    import pytest
except ImportError:
    class Any:
        def __getattr__(self, n): return self
        def __call__(self, *a, **k): return a[0] if len(a) == 1 and callable(a[0]) and not k else (lambda f: f)
    m = types.ModuleType("pytest"); m.mark = Any(); m.fixture = Any(); m.raises = None; m.MonkeyPatch = object
    sys.modules["pytest"] = m; print("no pytest")
from tests.codegen import test_triton as T
bad = n = 0
def go(f, *a):
    global bad, n
    n += 1
    try: f(*a)
    except Exception as e:
        bad += 1; print("FAIL", f.__name__, a, type(e).__name__, str(e)[:600].replace("\n", " | "), flush=True)
for name in T.CASES: go(T.test_gpu, name)
for x in T.all_operations(): go(T.test_gpu_operation, *x)
go(T.test_gpu_library_of_sizes_and_streams)
print(n, "checks", bad, "failed", flush=True)
