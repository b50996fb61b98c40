"""S4-S6: whatever a module is called, source, comments and dump paths stay ours.

Ten thousand hostile names go through the three sanitizers; the results are put into Python and C++ text, which is
parsed (never run) and must hold nothing but the names we made.
"""

from __future__ import annotations

import ast
import os
import random
import re
import shutil
import subprocess
import tokenize
from io import BytesIO

import pytest

from fusionc.codegen.names import MAX_COMMENT, MAX_PATH, RESERVED, comment, identifier, path_component

SEEDS = [
    'a");import os;os.system("touch X")#', "for", "class", "template", "int", "None", "True", "\n", "a\nimport os\n",
    "a\r\nb", "a\x0bb", "a\x0cb", "a\x1cb", "a\x85b", "a\u2028b", "a\u2029b", "\0", "a\0b", "\u202eevil", "\u0430bc",
    "\uff41bc", "x" * 10_000, "__class__", "__builtins__", "tl", "tid", "triton", "linux", "unix", "y0", "exp", "../../x",
    "/etc/passwd", "..", ".", "", " ", "-rf", "~", "C:\\x", "con", "NUL.txt", "a" * 300, "A" * 300, "Block", "block",
    "BLOCK", "*/ int x; /*", "/* a", "a \\", "a \\\t", "??/", "???/", "a??/\nb", '"""', "'''", '""""', "coding: utf-7",
    "-*- coding=latin-1 -*-", "\ud800", "%s{0}{x.__class__}", "$(touch X)", "`touch X`", "a;b", "a|b", "0", "0x7f", "1e5",
    "_", "__", "___a", "a__b", "<script>alert(1)</script>", "]]>", "#include </etc/passwd>", "#pragma", "\u00b2", "\u0660",
    "\u017f", "\u212a", "\u0130",
]  # fmt: skip


def hostile(count: int = 10_000) -> list[str]:
    rng = random.Random(20240607)
    pieces = [*SEEDS, *sorted(RESERVED)[::7], "os.system", "/", "\\", "..", "*/", "?", '"', "'", "\n", "#", "//"]
    letters = [chr(c) for c in [*range(256), 0x202E, 0x2028, 0x0430, 0xFF41, 0x1F600, 0xD800]]
    names = list(SEEDS) + sorted(RESERVED)
    while len(names) < count:
        kind = rng.random()
        if kind < 0.5:
            names.append("".join(rng.choices(letters, k=rng.randint(0, 24))))
        elif kind < 0.9:
            names.append("".join(p if len(p) < 400 else p[:400] for p in rng.choices(pieces, k=rng.randint(1, 4))))
        else:
            name = rng.choice(pieces)
            names.append("".join(c.upper() if rng.random() < 0.5 else c.lower() for c in name))
    return names


NAMES = hostile()


def test_there_are_enough():
    assert len(NAMES) >= 10_000


def test_identifiers():
    taken: set[str] = set()
    made = [identifier(name, taken) for name in NAMES]
    assert len(set(made)) == len(made) and taken == set(made)
    for ident in made:
        assert re.fullmatch(r"[a-z_][a-z0-9_]{0,62}", ident)
        assert ident not in RESERVED and "__" not in ident and not ident.startswith("_")
    again: set[str] = set()
    assert made == [identifier(name, again) for name in NAMES]


def test_identifiers_stay_readable():
    taken: set[str] = set()
    assert identifier("L['self']._modules['fc1'].weight", taken) == "l_self_modules_fc1_weight"
    assert identifier("fc1", taken) == "fc1"
    assert identifier("fc1", taken) == "fc1_1"
    assert identifier("for", taken) == "v_for"
    assert identifier("\u0430", taken) == "n"


def test_many_equal_names_are_cheap():
    taken: set[str] = set()
    assert len({identifier("x", taken) for _ in range(20_000)}) == 20_000


def test_python_source_holds_only_our_names():
    taken: set[str] = set()
    lines, made = [], []
    for name in NAMES:
        ident = identifier(name, taken)
        made.append(ident)
        lines.append(f"# {comment(name)}\n{ident} = 1  # {comment(name)}\n")
    source = "".join(lines)
    encoding, _ = tokenize.detect_encoding(BytesIO(source.encode()).readline)
    assert encoding == "utf-8"
    tree = ast.parse(source)
    assert len(tree.body) == len(NAMES)
    for statement, ident in zip(tree.body, made, strict=True):
        assert ast.dump(statement) == f"Assign(targets=[Name(id='{ident}', ctx=Store())], value=Constant(value=1))"


def test_comments():
    for name in NAMES:
        text = comment(name)
        assert len(text) <= MAX_COMMENT
        assert all(" " <= c <= "~" for c in text)
        assert "\\" not in text and "*/" not in text and "/*" not in text and "??" not in text
        assert '"""' not in text and "'''" not in text and not text.endswith('"')
        assert not re.search(r"coding[:=]", text)
        assert ast.literal_eval(f'"""{text}"""') == text
        assert ast.dump(ast.parse(f"1  # {text}\n")) == ast.dump(ast.parse("1"))
        assert comment(text) == text


def test_comment_keeps_ordinary_text():
    assert comment("model.py:12  rms_norm(x, w) * 2") == "model.py:12 rms_norm(x, w) * 2"


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_cpp_source_compiles(tmp_path):
    taken: set[str] = set()
    lines = ["#include <math.h>\n#include <stdint.h>\n#include <stdlib.h>\n#include <unistd.h>\n#include <time.h>\n"]
    for name in NAMES:
        ident = identifier(name, taken)
        lines.append(f"// {comment(name)}\nint {ident} = 1; /* {comment(name)} */ // {comment(name)}\n")
    lines.append(f"static_assert(__LINE__ == {2 * len(NAMES) + 6});\n")
    file = tmp_path / "names.cpp"
    file.write_text("".join(lines))
    # trigraphs and comment warnings on, in GNU mode where `linux` is a macro
    command = ["g++", "-std=gnu++17", "-trigraphs", "-Wall", "-Wcomment", "-Werror", "-fsyntax-only", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[:2000]


def test_path_components_stay_inside(tmp_path):
    seen: dict[str, str] = {}
    taken: set[str] = set()
    for name in NAMES:
        part = path_component(name)
        assert re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", part) and len(part) <= MAX_PATH
        assert not part.endswith(".") and ".." not in part
        assert os.path.dirname(os.path.realpath(tmp_path / part)) == os.path.realpath(tmp_path)
        # distinct names stay apart, also where case is ignored
        assert seen.setdefault(part.lower(), name) == name
        counted = path_component(name, taken)
        assert re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", counted) and len(counted) <= MAX_PATH
    assert len(taken) == len(NAMES)


def test_path_component_stays_readable():
    assert path_component("rmsnorm_rope") == "rmsnorm_rope"
    taken: set[str] = set()
    assert path_component("g0_LlamaBlock", taken) == "g0_LlamaBlock"
    assert path_component("g0_llamablock", taken) == "g0_llamablock_1"
