"""The only door through which a user's names reach generated source, comments and file paths.

A module or parameter may be called anything: a keyword, a newline, ``../../x``, or text that closes a string and calls
``os.system``.  Nothing of it is quoted or escaped here; only a safe remainder is kept.  All three functions are pure:
the same name gives the same text in every process.
"""

from __future__ import annotations

import builtins
import hashlib
import keyword
import re

MAX_IDENTIFIER = 63
MAX_COMMENT = 200
MAX_PATH = 100

_CPP = """
alignas alignof and and_eq asm atomic_cancel atomic_commit atomic_noexcept auto bitand bitor bool break case catch char
char8_t char16_t char32_t class compl concept const consteval constexpr constinit const_cast continue contract_assert
co_await co_return co_yield decltype default delete do double dynamic_cast else enum explicit export extern false final
float for friend goto if import inline int long module mutable namespace new noexcept not not_eq nullptr operator or
or_eq override private protected public reflexpr register reinterpret_cast requires restrict return short signed sizeof
static static_assert static_cast struct switch synchronized template this thread_local throw transaction_safe true try
typedef typeid typename typeof union unsigned using virtual void volatile wchar_t while xor xor_eq
"""

# Names that C and C++ compilers, headers or our own generated text give a meaning to without being keywords.
# `linux` and `unix` are macros worth 1 in GNU mode.
_C_NAMES = """
linux unix i386 near far main errno stdin stdout stderr assert std omp int8_t int16_t int32_t int64_t uint8_t uint16_t
uint32_t uint64_t intptr_t uintptr_t size_t ssize_t ptrdiff_t va_list float_t double_t half bfloat16 abs labs llabs div
ldiv exit abort atexit malloc calloc realloc free alloca memcpy memmove memset memcmp system getenv rand srand random
index rindex time clock signal raise read write open close link unlink access pipe fork kill sleep printf puts putchar
acos acosh asin asinh atan atan2 atanh cbrt ceil copysign cos cosh drem erf erfc exp exp10 exp2 expm1 fabs fdim floor
fma fmax fmin fmod frexp gamma hypot ilogb isfinite isinf isnan isnormal fpclassify signbit j0 j1 jn y0 y1 yn ldexp
lgamma llrint llround log log10 log1p log2 logb lrint lround modf nan nearbyint nextafter nexttoward pow remainder
remquo rint round scalb scalbln scalbn signgam significand sin sincos sincosf sinh sqrt tan tanh tgamma trunc swap move
forward min max clamp
"""

_TRITON = """
tl triton tid pid jit libdevice language extra core constexpr program_id num_programs arange load store dot where cdiv
torch aten ops prims fusionc np numpy os sys math ctypes launch grid stream device kernel program self cls args kwargs
"""


def _words(text: str) -> set[str]:
    return set(text.split())


RESERVED = frozenset(
    word.lower()
    for word in (
        set(keyword.kwlist) | set(keyword.softkwlist) | set(dir(builtins)) | _words(_CPP) | _words(_C_NAMES)
        | _words(_TRITON) | _words("case match type")
    )
)  # fmt: skip


def identifier(name: str, taken: set[str]) -> str:
    """A new identifier that recalls ``name``; it is added to ``taken``.

    It matches ``[a-z_][a-z0-9_]{0,62}``, is not in ``taken`` and is no keyword, builtin or library name of Python, C,
    C++ or Triton.  It holds no double underscore and no leading one, which C++ reserves.
    """
    base = re.sub(r"[^a-z0-9]+", "_", str(name)[: 4 * MAX_IDENTIFIER].lower()).strip("_")
    if not base or base[0].isdigit():
        base = f"n{base}"
    base = base[:MAX_IDENTIFIER].rstrip("_")
    if base in RESERVED:
        base = f"v_{base}"
    # after some tries jump ahead, so that ten thousand equal names do not cost fifty million tries
    unique, tries = base, 0
    while unique in taken or unique in RESERVED:
        tries += 1
        number = tries if tries <= 16 else len(taken) + tries
        suffix = f"_{number}"
        unique = base[: MAX_IDENTIFIER - len(suffix)].rstrip("_") + suffix
    taken.add(unique)
    return unique


def comment(text: str) -> str:
    """``text`` as one line that is harmless after ``#`` or ``//``, in ``/* */`` and in a triple-quoted string.

    Printable ASCII only, at most ``MAX_COMMENT`` characters; no backslash (it would splice the next line), no ``*/``
    or ``/*``, no trigraph, no triple quote, and nothing that Python reads as an encoding declaration.
    """
    line = "".join(c if " " <= c <= "~" else ("?" if c > "~" else " ") for c in str(text)[: 4 * MAX_COMMENT])
    line = re.sub(r" +", " ", line.replace("\\", "/")).strip()
    if len(line) > MAX_COMMENT:
        line = line[: MAX_COMMENT - 3] + "..."
    line = re.sub(r"([\"'])\1{2,}", r"\1", line)
    line = re.sub(r"(?i)coding(?=[:=])", "coding ", line)
    line = re.sub(r"\?(?=\?)", "? ", line)
    line = re.sub(r"\*(?=/)|/(?=\*)", lambda m: m.group() + " ", line)
    return line[:MAX_COMMENT].rstrip(' "')


def path_component(name: str, taken: set[str] | None = None) -> str:
    """One file or folder name that recalls ``name``: never a path, never hidden, at most ``MAX_PATH`` characters.

    Names that differ, also by case alone, give components that differ on a file system that ignores case: through a
    number where the caller passes ``taken`` (which receives the result), else through a hash where anything was lost.
    """
    raw = str(name)
    base = re.sub(r"[^A-Za-z0-9_.-]+", "_", raw[: 4 * MAX_PATH])
    base = re.sub(r"\.{2,}", ".", base).strip("._-")[: MAX_PATH - 20].strip("._-") or "unnamed"
    if re.fullmatch(r"(?i)(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?", base):
        base = f"_{base}"
    if taken is None:
        if base == raw and raw == raw.lower():
            return base
        return f"{base}_{hashlib.sha256(raw.encode('utf-8', 'surrogatepass')).hexdigest()[:12]}"
    unique, tries = base, 0
    while unique.lower() in taken:
        tries += 1
        unique = f"{base}_{tries if tries <= 16 else len(taken) + tries}"
    taken.add(unique.lower())
    return unique
