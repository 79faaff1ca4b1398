"""`benchmarks/step_cost.py --architecture`: the floor without a formula, and a family per route."""

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.steps import step_batch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"

pytestmark = pytest.mark.filterwarnings("ignore")  # of TRL, Lightning and the counter's hooks


@pytest.fixture(scope="module")
def load():
    """A script of the benchmarks by its name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield importlib.import_module


@pytest.fixture(scope="module")
def settings(load) -> Any:
    shape = load("inputs").Shape(
        hidden_size=32, intermediate_size=64, num_layers=2, num_heads=4, vocabulary=512
    )
    return load("step_runs").Settings(shape=shape, num_records=4, batch_size=4, max_length=64)


@pytest.fixture(scope="module")
def records(load) -> list[dict[str, Any]]:
    return load("inputs").made_records(4, words=12, prompt_share=0.5)


@pytest.mark.parametrize("max_tokens", [10**6, 25], ids=["one", "several"])
@pytest.mark.parametrize("cached", [False, True], ids=["computed", "cached"])
def test_the_counted_floor_is_that_of_the_formula(
    load, settings, max_tokens: int, cached: bool
) -> None:
    """Where there is a formula."""
    model = load("inputs").make_model(settings.shape)
    step = step_batch(max_tokens=max_tokens)
    assert (len(step.micro_batches) == 1) == (max_tokens > 25)
    floors, counted = load("step_floor"), load("counted_floor").CountedFloor(model)
    formula = floors.floor(step, floors.UnitCosts.of(model), cached=cached)
    assert counted(step, cached=cached) == pytest.approx(formula, rel=5e-3)  # rotary positions


@pytest.fixture(scope="module")
def measured(load, settings, records, tmp_path_factory: pytest.TempPathFactory):
    def measure(family: str) -> dict[str, Any]:
        directory = tmp_path_factory.mktemp("families") / family
        return load("step_families").measure_family(family, records, settings, directory)

    return measure


def test_a_packed_step_is_at_its_floor(measured) -> None:
    result = measured("qwen3")
    assert (result["route"], result["reason"]) == ("packed", "")
    for row in result["rows"]:
        assert row["positions_per_token"] == 1
        # Nothing counted may be missing either: a step cannot cost less than its floor.
        assert 1 <= row["over_floor"] == row["over_padded_floor"] <= 1.03
        assert row["over_sft"] < row["over_sft_completions"]


def test_a_step_on_cached_prompts_pays_for_its_padding_alone(measured) -> None:
    result = measured("lfm2")
    assert (result["route"], result["reason"].partition(":")[0]) == ("cached", "not packed")
    for row in result["rows"]:
        assert row["positions_per_token"] >= 1
        assert row["over_padded_floor"] <= 1.1


def test_the_padded_route_has_the_floor_of_the_others(load, settings) -> None:
    """In one micro-batch: [x y'] counts as y' on top of x."""
    counted = load("counted_floor").CountedFloor(load("inputs").make_model(settings.shape))
    floors = load("step_floor")
    for cached in (False, True):
        packed, padded = (step_batch(packed=packed) for packed in (True, False))
        assert counted(packed, cached=cached) == counted(padded, cached=cached) > 0
        needed = [floors.num_positions(step, cached=cached) for step in (packed, padded)]
        assert needed[0] == needed[1] > 0


def made_result(route: str, over_padded_floor: float) -> dict[str, Any]:
    numbers = ("over_sft", "over_sft_completions", "over_floor", "positions_per_token")
    row = dict.fromkeys(numbers, 1.5) | {"over_padded_floor": over_padded_floor}
    row |= {"micro_batches": "one", "reference": "cached"}
    reason = "" if route == "packed" else "not packed: it has layers"
    return {"family": "a", "route": route, "reason": reason, "rows": [row]}


@pytest.mark.parametrize(
    ("route", "over_padded_floor", "status"),
    [
        ("packed", 1.029, 0),
        ("packed", 1.031, 1),
        ("cached", 1.09, 0),
        ("cached", 1.11, 1),
        ("padded", 2.0, 0),
    ],
)
def test_the_exit_status(
    route: str, over_padded_floor: float, status: int, load, monkeypatch, tmp_path: Path, capsys
) -> None:
    script = load("step_cost")
    result = made_result(route, over_padded_floor)
    monkeypatch.setattr(script, "measure_family", lambda *_: result)
    file = tmp_path / "result.json"
    assert script.main(["--architecture", "qwen3", "--json", str(file)]) == status
    printed = capsys.readouterr().out
    assert ("more than 1." in printed) == bool(status)
    assert (f"a: {route}; not packed: it has layers" in printed) == (route != "packed")
    assert printed.count(f"| a      | {route} |") == 2
    assert [r["route"] for r in json.loads(file.read_text())["results"]] == [route] * 2


@pytest.mark.parametrize("groups", [1, 6])
def test_convolutions_are_counted_by_what_meets(load, groups: int) -> None:
    """Three taps at each of 10 outputs, 6 channels to 6; twice as many in backward."""
    layer = torch.nn.Conv1d(6, 6, 3, groups=groups)
    inputs = torch.zeros(2, 6, 12, requires_grad=True)
    with load("operations").counter() as counted:
        outputs = layer(inputs)
    forward = 2 * 2 * 10 * 3 * 6 * 6 // groups
    assert counted.get_total_flops() == forward
    with load("operations").counter() as counted:
        outputs.sum().backward()
    assert counted.get_total_flops() == 2 * forward


def test_products_of_experts_are_counted_row_by_row(load) -> None:
    """16 rows of width 8 to width 4, in three groups; twice as many in backward."""
    rows = torch.ones(16, 8, requires_grad=True)
    weights = torch.ones(3, 8, 4, requires_grad=True)
    ends = torch.tensor([4, 10, 16], dtype=torch.int32)
    with load("operations").counter() as counted:
        torch.nn.functional.grouped_mm(rows, weights, offs=ends).square().sum().backward()
    assert counted.get_total_flops() == 3 * 2 * 16 * 8 * 4
