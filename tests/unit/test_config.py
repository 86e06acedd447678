"""The options of a virtual machine: what is refused, and what is made from the fields."""

import json
from dataclasses import fields, replace
from typing import Any

import pytest

from tests.unit.fakes import fake_machine
from understudy import state
from understudy.config import Config, option_of
from understudy.vm import VM


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"memory": "16"}, "^memory '16': expected 1M to 256G, whole pages$"),
        ({"memory": (16 << 20) + 1}, "expected 1M to 256G, whole pages"),
        ({"memory": "lots"}, "such as 256M"),
        ({"clock": "sundial"}, "^clock 'sundial': expected one of virtual, wall$"),
        ({"engine": "steam"}, "expected one of dbt, reference"),
        ({"largest_page": "3K"}, "^largest_page '3K': expected 4K, 2M or 1G$"),
        ({"cpus": 65}, "cpus 65: expected 1 to 64"),
        ({"cpus": "4,cores=3"}, "whose product it is"),
        ({"name": 7}, "^name 7: expected a text$"),
        ({"devices": ["uart16550"]}, "expected rows like"),
    ],
)
def test_a_wrong_value_is_named_with_what_was_expected(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Config(**options)
    with pytest.raises(ValueError, match=words):
        replace(Config(), **options)


def test_sizes_are_kept_in_one_form() -> None:
    assert Config("256M") == Config(256 << 20) == Config()
    assert Config(largest_page=2 << 20).largest_page == "2M"


def test_it_is_made_of_what_a_user_says() -> None:
    assert Config.of() == Config()
    assert Config.of("64M", clock="wall") == Config("64M", clock="wall")
    given = Config(name="one")
    assert Config.of(given) is given
    assert Config.of(given, name="two") == Config(name="two")
    with pytest.raises(TypeError, match="colour"):
        Config.of(colour="red")


def test_a_snapshot_keeps_it_and_checks_it() -> None:
    rows = (
        ("virtio_console", {"ports": ["", "x"]}),
        ("uart16550", {"irq": 5, "name": "x"}),
        ("pit8254", {"at": (0x140, None)}),
    )
    config = Config("64M", engine="reference", devices=rows)
    assert config.devices[2] == ("pit8254", {"at": [0x140, None]})
    kept = json.loads(json.dumps(state.plain(config)))
    assert state.restore(Config, kept) == config
    for name, value in (("engine", "steam"), ("memory", 1.5), ("cpus", True), ("clock", None)):
        with pytest.raises(ValueError, match=name):
            state.restore(Config, kept | {name: value})
    with pytest.raises(ValueError, match="differ in"):
        state.restore(Config, {name: kept[name] for name in kept if name != "clock"})


def test_every_field_has_words_and_its_default_is_right() -> None:
    names = [name for one in fields(Config) for name in option_of(one).names]
    assert len(names) == len(set(names))
    for one in fields(Config):
        assert option_of(one).words.endswith(".")
        option_of(one).check(one.name, one.default)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"paging": "none"}, "^paging 'none': expected one of eager, ept, lazy, pv, vtlb$"),
        ({"execution": "magic"}, "^execution 'magic': expected one of .*vmx"),
    ],
)
def test_names_of_techniques_are_checked_where_they_are_known(
    options: dict[str, Any], words: str
) -> None:
    config = Config(**options)
    with fake_machine(), pytest.raises(ValueError, match=words):
        VM(config)


def test_a_vm_is_made_of_a_config_or_of_options() -> None:
    config = Config("16M", name="one")
    with fake_machine():
        assert VM(config).config is config
        assert VM(config, name="two").config == replace(config, name="two")
        assert VM(memory="16M", name="one").config == VM("16M", name="one").config == config
