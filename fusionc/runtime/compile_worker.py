"""A process that compiles Triton kernels for another one; run as a script, it imports nothing of fusionc and no torch.

Its argument is where the other process looks for packages. It reads jobs as lines of JSON, compiles each into the cache
folder that the job names, and answers with a line: the text of the error, or nothing. It ends when its input does, or
when no job has come for a minute.
"""

from __future__ import annotations

import importlib.util
import json
import os
import select
import sys
from typing import Any, BinaryIO

IDLE_SECONDS = 60.0


def main() -> None:
    """Answer jobs until there are no more."""
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # whatever a compiler prints is no answer
    sys.path[:] = json.loads(sys.argv[1])
    import triton.compiler  # noqa: F401  most of what a first job would wait for

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
