"""What a command does where nothing is said is what the API does."""

import inspect

import pytest

from kvsim.cli import run, tune, validate
from kvsim.engine.settings import RunSettings

FLAGS = {"l1_size_gb": "l1_gb", "l2_size_gb": "l2_gb"}
OF_THEIR_OWN = {("validate", "l0_block_tokens"), ("tune", "rate_scale"), ("tune", "engines")}
"""None there: the log's own block, and no flag of the simulation."""


@pytest.mark.parametrize("command", [run.run, validate.validate, tune.tune])
def test_the_defaults_of_the_options_are_those_of_the_settings(command):
    fields = {name: field.default for name, field in RunSettings.__dataclass_fields__.items()}
    options = {
        FLAGS.get(name, name): one.default
        for name, one in inspect.signature(command).parameters.items()
        if FLAGS.get(name, name) in fields and name != "profile"
    }
    assert len(options) >= 8
    own = {name for of, name in OF_THEIR_OWN if of == command.__name__}
    assert {name for name in own if options.pop(name) is None} == own
    assert options == {name: fields[name] for name in options}
