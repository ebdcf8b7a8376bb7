"""Options are checked once, and an unknown name is answered with the closest known one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from regraft.runtime.errors import InputError, OptionError
from regraft.runtime.options import Options, make_options, parse_passes
from regraft.runtime.topics import listen

PASSES = ("rms_norm", "rope", "attention", "qkv")


def options(**given: Any) -> Options:
    return make_options(PASSES, **{"environ": {}, **given})


def test_defaults() -> None:
    assert options() == Options()
    assert not options().raises


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"mod": "default"}, "no option 'mod', did you mean 'mode'"),
        ({"mode": "reduce_overhead"}, "mode='reduce_overhead' is not known, did you mean 'reduce-overhead'"),
        ({"verify": "fats"}, "verify='fats' is not known, did you mean 'fast'"),
        ({"on_error": "rise"}, "on_error='rise' is not known, did you mean 'raise'"),
        ({"passes": {"rop": False}}, "passes: unknown pass 'rop', did you mean 'rope'"),
        ({"passes": ["-atention"]}, "unknown pass 'atention', did you mean 'attention'"),
        ({"passes": {"rope": 0}}, "'rope' is 0; expected True or False"),
        ({"passes": [1]}, "1 is not a pass name"),
        ({"passes": 7}, "passes=7: expected a mapping"),
        ({"passes": ["-canonicalize"]}, "unknown pass 'canonicalize'. Known passes: rms_norm"),
        ({"cache_dir": 5}, "cache_dir=5: expected the path of a folder"),
        ({"strict": "yes"}, "strict='yes'"),
        ({"dry_run": 1}, "dry_run=1"),
        ({"verbose": 3}, "verbose=3"),
        ({"rules": "MyRule"}, "expected a list of rule instances"),
        ({"rules": [int]}, "int is a class; give an instance, int()"),
        ({"rules": [7], "is_rule": lambda r: False}, "7 is neither a regraft.Rule nor a regraft.GroupRule"),
        ({"environ": {"REGRAFT_PASSES": "-rop"}}, "REGRAFT_PASSES: unknown pass 'rop'"),
    ],
)
def test_what_is_wrong_is_named(given: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError) as caught:
        options(**given)
    assert message in str(caught.value)


@pytest.mark.parametrize("examples", [torch.zeros(1), [1], {1: torch.zeros(1)}, {"input_ids": [1, 2]}])
def test_example_inputs_are_a_mapping_with_tensors(examples: Any) -> None:
    with pytest.raises(InputError, match="example_inputs"):
        options(example_inputs=examples)


@pytest.mark.parametrize("passes", [{"rope": False, "qkv": True}, ["-rope", "+qkv"], ["-rope", "qkv"], "-rope,+qkv"])
def test_passes_in_every_spelling(passes: Any) -> None:
    assert parse_passes(passes, PASSES, "passes") == {"rope": False, "qkv": True}


def test_environment_is_applied_after_the_arguments() -> None:
    environ = {"REGRAFT_PASSES": "+rope -qkv", "REGRAFT_CACHE_DIR": "~/somewhere"}
    made = options(passes={"rope": False}, environ=environ)
    assert made.passes == {"rope": True, "qkv": False}
    assert made.cache_dir == Path("~/somewhere").expanduser()
    assert options(cache_dir="/else", environ=environ).cache_dir == Path("/else")


def test_strict_raises_as_on_error_does() -> None:
    assert options(strict=True).raises and options(on_error="raise").raises


def test_a_dump_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OptionError, match=r"REGRAFT_DUMP_DIR='.*file/dump' is no folder"):
        listen({"REGRAFT_DUMP_DIR": str(tmp_path / "file" / "dump")})
