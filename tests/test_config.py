"""Options and modes: what is accepted, and that every rejection says what would be."""

from __future__ import annotations

import copy
import dataclasses

import pytest

from fusionc.config import ENVIRONMENT, MODES, TARGETS, Config
from fusionc.errors import CompileError, FallbackWarning, OptionError, VerifyError, reset_warnings, warn_once


@pytest.fixture(autouse=True)
def no_environment(monkeypatch):
    for variable in ENVIRONMENT.values():
        monkeypatch.delenv(variable, raising=False)


class SomePass:
    name = "some_pass"


def test_defaults():
    assert Config.parse() == Config() == Config.parse("default", {}) == Config.parse(None, None)
    assert Config().mode == "default" and Config().cache is True and Config().target == "auto"


def test_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().mode = "x"  # type: ignore[misc]


def test_all_options_at_once_and_input_unchanged(tmp_path):
    p = SomePass()
    options = {
        "dump": tmp_path, "strict": True, "target": "cpp", "weights": "frozen", "passes": [p], "disable": ["cse", "some_pass"],
        "deterministic": False, "cache": str(tmp_path), "cudagraphs": False, "verify": True,
        "progress": False, "tune": "off", "remove_attention": 2, "large_kernel": {"method": "low_rank", "error": 0.1},
            "fft_conv": True,
    }  # fmt: skip
    before = copy.copy(options)
    config = Config.parse("max-autotune", options)
    assert options == before
    assert config.mode == "max-autotune" and config.passes == (p,) and config.disable == ("cse", "some_pass")
    assert config.dump == str(tmp_path)
    # every field but the mode can be given as an option
    assert {f.name for f in dataclasses.fields(Config)} == set(options) | {"mode"}


@pytest.mark.parametrize("mode", MODES)
def test_modes(mode):
    assert Config.parse(mode).mode == mode


def test_unknown_mode_lists_modes():
    with pytest.raises(OptionError) as e:
        Config.parse("max_autotune")
    assert "Did you mean 'max-autotune'?" in str(e.value)
    assert all(repr(m) in str(e.value) for m in MODES)


def test_unknown_option_lists_options():
    with pytest.raises(OptionError) as e:
        Config.parse(None, {"dmp": "x"})
    assert "'dmp'" in str(e.value) and "Did you mean 'dump'?" in str(e.value)
    assert "progress" in str(e.value) and "cudagraphs" in str(e.value)


def test_mode_is_not_an_option():
    with pytest.raises(OptionError, match="pass it to torch.compile itself"):
        Config.parse(None, {"mode": "default"})


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"target": "sm90"}, "Did you mean 'sm_90'?"),
        ({"target": []}, "Valid values: 'auto'"),
        ({"strict": 1}, "Valid values: True, False"),
        ({"strict": "yes"}, "Valid values: True, False"),
        ({"cudagraphs": "on"}, "'auto', True, False"),
        ({"cache": 3}, "True, False or a folder"),
        ({"cache": None}, "True, False or a folder"),
        ({"cache": ""}, "folder"),
        ({"dump": 3}, "a folder's path"),
        ({"dump": "a\0b"}, "a folder's path"),
        ({"dump": b"bytes"}, "a folder's path"),
        ({"weights": "check"}, "Did you mean 'checked'?"),
        ({"passes": SomePass()}, "a list of Pass instances"),
        ({"passes": [SomePass]}, "SomePass()"),
        ({"passes": [3]}, "with a name"),
        ({"disable": "abc"}, "list of pass names"),
        ({"disable": [1]}, "list of pass names"),
        ({"disable": ["conv_bnn"]}, "Did you mean 'conv_bn'?"),
        ({"disable": ["some_pass"]}, "horizontal_launch, horizontal_matmul"),  # the user's, but it was not given
        ({3: 1}, "unknown option 3"),
        ({("a",): 1}, "unknown option"),
    ],
)
def test_bad_values(options, found):
    with pytest.raises(OptionError) as e:
        Config.parse(None, options)
    assert found in str(e.value)


def test_options_must_be_a_dictionary():
    with pytest.raises(OptionError, match="must be a dictionary"):
        Config.parse(None, ["dump"])  # type: ignore[arg-type]


def test_object_with_broken_repr():
    class Bad:
        def __repr__(self):
            raise RuntimeError

    with pytest.raises(OptionError, match="type Bad"):
        Config.parse(None, {"target": Bad()})


def test_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("FUSIONC_DUMP", str(tmp_path))
    monkeypatch.setenv("FUSIONC_TARGET", "interpret")
    monkeypatch.setenv("FUSIONC_CACHE", "off")
    monkeypatch.setenv("FUSIONC_VERIFY", "1")
    config = Config.parse()
    assert (config.dump, config.target, config.cache, config.verify) == (str(tmp_path), "interpret", False, True)
    # an explicit option wins
    config = Config.parse(None, {"dump": None, "target": "cpp", "cache": True, "verify": False})
    assert config == Config(target="cpp")


def test_environment_cache_folder_and_empty(monkeypatch):
    monkeypatch.setenv("FUSIONC_CACHE", "/some/where")
    monkeypatch.setenv("FUSIONC_DUMP", "")
    assert Config.parse() == Config(cache="/some/where")


@pytest.mark.parametrize(("name", "value"), [("FUSIONC_TARGET", "gpu"), ("FUSIONC_VERIFY", "maybe")])
def test_bad_environment_names_the_variable(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    with pytest.raises(OptionError, match=name):
        Config.parse()


def test_targets_all_parse():
    for target in TARGETS:
        assert Config.parse(None, {"target": target}).target == target


def test_json_holds_no_paths(tmp_path):
    config = Config.parse(None, {"dump": tmp_path, "cache": tmp_path, "passes": [SomePass()]})
    assert str(tmp_path) not in repr(config.to_json())
    assert config.to_json()["passes"] == ["some_pass"]


def test_error_messages():
    assert str(VerifyError("after fold", "no meta on add_1", "run facts")) == "after fold: no meta on add_1 (run facts)"
    assert "FUSIONC_DUMP" in str(CompileError("k00"))
    assert "in there" in str(CompileError("k00", "there", "g++ said no")) and "g++ said no" in str(
        CompileError("k", "", "g++ said no")
    )


def test_warn_once():
    reset_warnings()
    with pytest.warns(FallbackWarning) as seen:  # noqa: PT031
        warn_once("k", "one")
        warn_once("k", "two")
        warn_once("l", "three")
    assert [str(w.message) for w in seen] == ["one", "three"]
    reset_warnings()
