"""``mode=`` and ``options=`` of ``torch.compile``, checked once and frozen.

The rest of the compiler reads one immutable ``Config`` and never the environment or the caller's dictionary: a
misspelled option is an error at once, not a setting that silently does nothing.  Defaults come from the environment
where a variable is named below; an explicit option wins over the environment.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from fusionc.errors import OptionError

MODES = ("default", "reduce-overhead", "max-autotune")
TARGETS = ("auto", "interpret", "cpp", "aten", "sm_80", "sm_90", "sm_100", "gfx942")
TUNE = ("default", "off", "max")
WEIGHTS = ("checked", "frozen", "manual")
ENVIRONMENT = {
    "dump": "FUSIONC_DUMP",
    "target": "FUSIONC_TARGET",
    "cache": "FUSIONC_CACHE",
    "verify": "FUSIONC_VERIFY",
    "tune": "FUSIONC_TUNE",
}
ONE_LAUNCH = "horizontal_launch"  # no pass, but may be disabled too: several kernels in one launch (many.py)
_TRUE, _FALSE = ("1", "true", "on", "yes"), ("0", "false", "off", "no")


@dataclass(frozen=True)
class Config:
    """All settings of one compilation. Build it with ``Config.parse``; the defaults are those of plain ``Config()``.

    mode             "default", "reduce-overhead" (prefers CUDA graphs), "max-autotune" (measures plans)
    dump             folder for the dump tree, or None; FUSIONC_DUMP
    strict           a fallback to ATen for lack of a lowering is an error
    target           what to generate for; FUSIONC_TARGET
    weights          how folded weights follow their sources: "checked", "frozen", "manual"
    passes           extra Pass instances, run after the built-in ones
    disable          names of passes that must not run
    deterministic    no float atomics
    cache            True, False or a folder; FUSIONC_CACHE
    cudagraphs       "auto", True or False
    verify           check every stage; FUSIONC_VERIFY
    tune             measure plans of kernels that cost time: "default", "off", "max" (that of max-autotune); FUSIONC_TUNE
    remove_attention attention sublayers to leave out (approximate): a count, fraction, layer numbers, a drop list
                     {"attention": [...], "mlp": [...], "block": [...]} or a Plan
    large_kernel     sums of cheaper filters for large kernels (approximate): {"method": ..., "error": ...} or a Plan
    fft_conv         True: long convolutions along one axis, and their gradients, through the Fourier transform where cheaper
    progress         "auto" (after 2 s, on a terminal), True or False
    """

    mode: str = "default"
    dump: str | None = None
    strict: bool = False
    target: str = "auto"
    weights: str = "checked"
    passes: tuple[Any, ...] = ()
    disable: tuple[str, ...] = ()
    deterministic: bool = True
    cache: bool | str = True
    cudagraphs: bool | str = "auto"
    verify: bool = False
    progress: bool | str = "auto"
    tune: str = "default"
    remove_attention: Any = None
    large_kernel: Any = None
    fft_conv: bool | None = None

    @classmethod
    def parse(cls, mode: str | None = None, options: Mapping[str, Any] | None = None) -> Config:
        """Check ``mode`` and ``options`` and fill the rest from the environment. Neither argument is changed.

        Raises OptionError naming the option, the value found and the valid ones.
        """
        values: dict[str, Any] = {"mode": _one_of("mode", "default" if mode is None else mode, MODES)}
        for key, variable in ENVIRONMENT.items():
            text = os.environ.get(variable, "")
            if text:
                values[key] = _checked(f"environment variable {variable}", key, _from_text(key, text))
        if options is not None and not isinstance(options, Mapping):
            raise OptionError(f"options must be a dictionary, found {type(options).__name__}.")
        for key, value in (options or {}).items():
            if key not in _CHECKS:
                raise OptionError(_unknown_option(key))
            values[key] = _checked(f"option {key!r}", key, value)
        _check_disabled(values.get("disable", ()), values.get("passes", ()))
        if values["mode"] == "max-autotune":
            values.setdefault("tune", "max")
        return cls(**values)

    def to_json(self) -> dict[str, Any]:
        """Settings as JSON values for a dump: passes by name, and folders only as "a folder" (they vary by run)."""
        out: dict[str, Any] = {}
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if f.name == "passes":
                value = [str(p.name) for p in value]
            elif f.name in ("dump", "cache") and isinstance(value, str):
                value = "a folder"
            elif isinstance(value, tuple):
                value = list(value)
            elif hasattr(value, "to_json"):
                value = value.to_json()
            out[f.name] = value
        return out


def _show(value: Any) -> str:
    try:
        text = repr(value)
    except Exception:  # noqa: BLE001 - a broken __repr__ of the user's object must not hide the real message
        text = f"an object of type {type(value).__name__}"
    return text if len(text) <= 80 else text[:77] + "..."


def _did_you_mean(word: Any, valid: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(valid), n=1, cutoff=0.5) if isinstance(word, str) else []
    return f" Did you mean {close[0]!r}?" if close else ""


def _unknown_option(key: Any) -> str:
    if key == "mode":
        return "'mode' is not an option; pass it to torch.compile itself: torch.compile(model, mode=...)."
    return f"unknown option {_show(key)}.{_did_you_mean(key, _CHECKS)} Valid options: {', '.join(sorted(_CHECKS))}."


def _one_of(where: str, value: Any, valid: tuple[Any, ...]) -> Any:
    # identity for bools: 1 == True would let 1 pass as True, and hashing an unhashable value would raise
    for v in valid:
        if value is v or (isinstance(value, str) and isinstance(v, str) and value == v):
            return v
    words = ", ".join(repr(v) for v in valid)
    hint = _did_you_mean(value, [v for v in valid if isinstance(v, str)])
    raise OptionError(f"{where} has no value {_show(value)}.{hint} Valid values: {words}.")


def _from_text(key: str, text: str) -> Any:
    if key in ("cache", "verify") and text.lower() in _TRUE:
        return True
    if key in ("cache", "verify") and text.lower() in _FALSE:
        return False
    if key == "tune" and text.lower() in _FALSE:
        return "off"
    return text


def _checked(where: str, key: str, value: Any) -> Any:
    return _CHECKS[key](where, value)


def _choice(*valid: Any) -> Callable[[str, Any], Any]:
    return lambda where, value: _one_of(where, value, valid)


_bool = _choice(True, False)


def _folder(where: str, value: Any) -> str:
    if isinstance(value, (str, os.PathLike)):
        path = os.fspath(value)
        if isinstance(path, str) and path and "\0" not in path:
            return os.path.expanduser(path)
    raise OptionError(f"{where} must be a folder's path, found {_show(value)}.")


def _dump(where: str, value: Any) -> str | None:
    return None if value is None else _folder(where, value)


def _cache(where: str, value: Any) -> bool | str:
    if isinstance(value, bool):
        return value
    if isinstance(value, (str, os.PathLike)):
        return _folder(where, value)
    raise OptionError(f"{where} must be True, False or a folder's path, found {_show(value)}.")


def _names(where: str, value: Any) -> tuple[str, ...]:
    if isinstance(value, (list, tuple, set, frozenset)) and all(isinstance(v, str) for v in value):
        return tuple(sorted(value)) if isinstance(value, (set, frozenset)) else tuple(value)
    raise OptionError(f"{where} must be a list of pass names, found {_show(value)}.")


def _check_disabled(disabled: tuple[str, ...], passes: tuple[Any, ...]) -> None:
    """Each name is that of a pass, ours or the user's: a misspelled one would leave the pass running."""
    if not disabled:
        return
    from fusionc.passes import PIPELINE

    valid = {step.item.name for step in PIPELINE if step.item is not None} | {p.name for p in passes} | {ONE_LAUNCH}
    for name in disabled:
        if name not in valid:
            raise OptionError(f"option 'disable': there is no pass {_show(name)}.{_did_you_mean(name, sorted(valid))} "
                              f"Passes: {', '.join(sorted(valid))}.")  # fmt: skip


def _passes(where: str, value: Any) -> tuple[Any, ...]:
    if not isinstance(value, (list, tuple)):
        raise OptionError(f"{where} must be a list of Pass instances, found {_show(value)}.")
    for p in value:
        if isinstance(p, type):
            raise OptionError(f"{where} holds the class {p.__name__}; put an instance there: {p.__name__}().")
        if not isinstance(getattr(p, "name", None), str):
            raise OptionError(f"{where} must hold Pass instances (with a name), found {_show(p)}.")
    return tuple(value)


def _remove_attention(where: str, value: Any) -> Any:
    if value is None:
        return None
    from fusionc.removal.choose import check

    return check(where, value)


def _large_kernel(where: str, value: Any) -> Any:
    if value is None:
        return None
    from fusionc.passes.large_kernel import check_option

    return check_option(where, value)


_CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "dump": _dump,
    "strict": _bool,
    "target": _choice(*TARGETS),
    "weights": _choice(*WEIGHTS),
    "passes": _passes,
    "disable": _names,
    "deterministic": _bool,
    "cache": _cache,
    "cudagraphs": _choice("auto", True, False),
    "verify": _bool,
    "progress": _choice("auto", True, False),
    "tune": _choice(*TUNE),
    "remove_attention": _remove_attention,
    "large_kernel": _large_kernel,
    "fft_conv": lambda where, value: _bool(where, value) or None,
}
