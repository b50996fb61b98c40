"""A process that compiles Triton kernels for another one; run as a script, it imports nothing of fusionc and no torch.

Its argument is where the other process looks for packages. It reads jobs as lines of JSON, compiles each into the cache
folder that the job names, and answers with a line: the text of the error, or nothing. It ends when its input does, or
when no job has come for a minute.

`pairs_apart`, around every call of Triton's compiler here and there, corrects what becomes of its output.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import select
import sys
import threading
from collections.abc import Iterator
from typing import Any, BinaryIO

IDLE_SECONDS = 60.0

_PAIRS = re.compile(r"^[ \t]*(add|min|max)\.([su])16x2[ \t]+(%\w+), (%\w+), (%\w+);", re.MULTILINE)
_APART = r"""	{
	.reg .b16 %one0, %two0, %one1, %two1;
	mov.b32 {%one0, %two0}, \4;
	mov.b32 {%one1, %two1}, \5;
	\1.\g<2>16 %one0, %one0, %one1;
	\1.\g<2>16 %two0, %two0, %two1;
	mov.b32 \3, {%one0, %two0};
	}"""
_hooked = threading.Lock()
_inside = 0  # calls of the compiler at the moment
_theirs: Any = None  # the hook that was there


def apart(ptx: str) -> str:
    """PTX whose operations on two 16-bit integers at once are two operations each.

    LLVM packs indices that it knows to be below 256 (`tl.arange(0, 256) % 6`) as pairs, and ptxas 12.8 then makes x + {0, 0} of
    x + {255, 255}, that is x - 1 in bytes, where one of the two is not used: a kernel of `F.pad` read in front of its
    input (H200, Triton 3.6; 3.7 has the same assembler).
    """
    return _PAIRS.sub(_APART, ptx)


def _hook(*args: Any) -> Any:
    """Triton's `add_stages_inspection_hook`: without arguments the additions to its cache's keys."""
    if not args:
        key, digest = _theirs() if _theirs is not None else ("", "")
        return f"{key}pairs_apart", f"{digest}pairs_apart"
    stages = args[1]
    if _theirs is not None:
        _theirs(*args)
    if "ptx" in stages:
        make = stages["ptx"]
        stages["ptx"] = lambda *given: apart(make(*given))
    return None


@contextlib.contextmanager
def pairs_apart() -> Iterator[None]:
    """`apart` between LLVM and the assembler for what Triton compiles within, by any thread."""
    global _inside, _theirs
    from triton import knobs

    with _hooked:
        if not _inside and knobs.runtime.add_stages_inspection_hook is not _hook:
            _theirs = knobs.runtime.add_stages_inspection_hook
            knobs.runtime.add_stages_inspection_hook = _hook
        _inside += 1
    try:
        yield
    finally:
        with _hooked:
            _inside -= 1
            # others, a second copy of this module say, may have put theirs in its place, or put it back
            if not _inside and knobs.runtime.add_stages_inspection_hook is _hook:
                knobs.runtime.add_stages_inspection_hook, _theirs = _theirs, None


def others_hook() -> bool:
    """Has somebody else set Triton's hook?  Ours, around what any thread compiles at the moment, does not count."""
    from triton import knobs

    with _hooked:
        hook = knobs.runtime.add_stages_inspection_hook
        return (_theirs if hook is _hook else hook) is not None


def main() -> None:
    """Answer jobs until there are no more."""
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # whatever a compiler prints is no answer
    sys.path[:] = json.loads(sys.argv[1])
    import triton.compiler.code_generator  # noqa: F401  most of what a first job would wait for

    answers.write(b"ready\n")
    with open(0, "rb", buffering=0) as stream:
        while (line := _line(stream)) is not None:
            answers.write(json.dumps(_answer(json.loads(line))).encode() + b"\n")


def _line(stream: BinaryIO) -> bytes | None:
    """The next job; None for the end or after a minute without one."""
    parts: list[bytes] = []
    while not parts or not parts[-1].endswith(b"\n"):
        if not select.select([stream], [], [], IDLE_SECONDS)[0]:
            return None
        part = stream.read(1 << 16)
        if not part:
            return None
        parts.append(part)
    return b"".join(parts)


def _answer(job: dict[str, Any]) -> str:
    try:
        _compile(job)
    except Exception as e:  # noqa: BLE001 - the other process meets it again and reports it
        return f"{type(e).__name__}: {e}"
    return ""


def _compile(job: dict[str, Any]) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.runtime import cache

    if [triton.__version__, triton.__file__] != job["triton"]:
        raise RuntimeError("this is another Triton")  # the binary would stand under the other one's name
    os.environ["TRITON_CACHE_DIR"] = job["folder"]
    cache.triton_key = lambda: job["libraries"]  # the hash of Triton's libraries takes 0.4 s, and he knows it
    source = ASTSource(
        fn=getattr(_module(job["module"], job["path"]), job["name"]),
        signature=job["signature"],
        constexprs={(int(i),): value for i, value in job["constants"]},
        attrs={(int(i),): values for i, values in job["attributes"]},
    )
    with pairs_apart():
        triton.compile(source, target=GPUTarget(*job["target"]), options=job["options"])


def _module(name: str, path: str) -> Any:
    """The module of a generated text, under the name that it has in the other process."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.dont_write_bytecode = True
        spec.loader.exec_module(module)
        sys.modules[name] = module
    return sys.modules[name]


if __name__ == "__main__":
    main()
