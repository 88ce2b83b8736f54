from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from rayfm.config import ConfigError
from rayfm.planning.hardware import HARDWARE, Hardware, load_hardware


@pytest.mark.parametrize("name", sorted(HARDWARE))
def test_every_device_is_complete_and_says_where_its_figures_are_from(name: str):
    found = load_hardware(name)
    assert "NVIDIA" in found.source
    assert found.peak_flops("bf16") > found.peak_flops("tf32") > found.peak_flops("fp32")


def test_peaks_are_in_operations_a_second():
    assert load_hardware("h100").peak_flops("bf16") == 989e12
    assert load_hardware("h100").peak_flops("fp32") == 67e12


def test_single_figures_can_be_changed():
    found = load_hardware("h100", overrides=["network_gbs=12.5", "compute_efficiency=0.5"])
    assert (found.network_gbs, found.compute_efficiency, found.memory_gb) == (12.5, 0.5, 80)


def test_a_file_adds_devices_and_changes_known_ones(tmp_path: Path):
    file = tmp_path / "own.yaml"
    own = {"ours": {"base": "h200", "network_gbs": 25}, "a100": {"base": "a100", "memory_gb": 40}}
    file.write_text(yaml.safe_dump(own))
    assert load_hardware("ours", file).model_dump() == {
        **load_hardware("h200").model_dump(),
        "network_gbs": 25,
        "source": f"h200, changed in {file}",
    }
    assert load_hardware("a100", file).memory_gb == 40
    assert load_hardware("h100", file) == load_hardware("h100")


def test_bad_input_says_what_there_is(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"'h1000' is not known.*did you mean 'h100'.*a100, b200, h100, h200"):
        load_hardware("h1000")
    with pytest.raises(ConfigError, match=r"benchmarks\.plan --write cpu\.yaml"):
        load_hardware("cpu")
    with pytest.raises(ConfigError, match="network_gb"):
        load_hardware("h100", overrides=["network_gb=25"])
    with pytest.raises(ConfigError, match="greater than 0"):
        load_hardware("h100", overrides=["memory_gbs=0"])
    file = tmp_path / "own.yaml"
    file.write_text("mine: 3\nyours: {base: h101}\nhis: {memory_gb: 1}\n")
    with pytest.raises(ConfigError, match="'mine' is not a mapping"):
        load_hardware("mine", file)
    with pytest.raises(ConfigError, match="base 'h101' of 'yours' is not known"):
        load_hardware("yours", file)
    with pytest.raises(ConfigError, match="bf16_tflops"):
        load_hardware("his", file)


def test_the_assumed_shares_are_the_documented_ones():
    defaults = {name: field.default for name, field in Hardware.model_fields.items() if not field.is_required()}
    text = (Path(__file__).resolve().parents[2] / "docs" / "planning.md").read_text()
    for name in ("compute_efficiency", "memory_efficiency", "link_efficiency", "operator_us", "hop_us", "reserved"):
        assert f"| `{name}` | {defaults[name]:g} |" in text
    for name, figures in HARDWARE.items():
        row = next(line for line in text.splitlines() if line.startswith(f"| {name} |"))
        cells = [cell.strip() for cell in row.split("|")[2:10]]
        keys = [key for key in figures if key != "source"]
        assert [float(cell.replace(",", "")) for cell in cells] == [figures[key] for key in keys]
        assert figures["source"] in row
