"""Correction in simulation: every rank has its own sampler and its own fit, and sees only what was gathered."""

import itertools
import json
import logging
import pickle
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from hf_dflop.balance import assign
from hf_dflop.cost import CostModel, ModelSpec
from hf_dflop.data.sampler import BalancedBatchSampler
from hf_dflop.data.step_plan import stock_caps
from hf_dflop.data.versions import CostVersion
from hf_dflop.errors import BalanceError, TrainerError
from hf_dflop.integrations.correction import KEY, LOG_KEYS, Correct, Correction
from hf_dflop.integrations.measured import MeasuredStep, digest_of
from hf_dflop.integrations.straggler import straggler_line
from hf_dflop.shapes import Shapes
from tests.distributed import tiny

RANKS, SLOTS, SIZE, EPOCH = 4, 2, 6, 30
SPEC = ModelSpec.from_config(tiny.model().config)


def make_shapes() -> Shapes:
    rng = np.random.default_rng(0)
    count = RANKS * SLOTS * SIZE * EPOCH
    images = np.minimum(rng.geometric(0.4, count) - 1, 12)
    text = np.clip(rng.lognormal(4, 1, count), 4, 2000).astype(np.int64)
    return Shapes(
        num_images=images, image_tiles=images, image_patches=64 * images, image_patches_sq=images * 64**2,
        image_tokens=4 * images, text_tokens=text, label_tokens=text // 2,
    )  # fmt: skip


SHAPES = make_shapes()
_UNIT = CostModel.analytic(SPEC)
_FAST = {  # 0.1 s a microbatch, half of it vision
    "vision_flops_per_s": 1e12 * _UNIT.vision_s(SHAPES).mean() * SIZE / 0.05,
    "llm_flops_per_s": 1e12 * _UNIT.llm_s(SHAPES).mean() * SIZE / 0.05,
}
TRUE = CostModel.analytic(SPEC, **_FAST)
WRONG = CostModel.analytic(SPEC, **(_FAST | {"vision_flops_per_s": 2 * _FAST["vision_flops_per_s"]}))


@pytest.fixture(autouse=True)
def _one_planner_for_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks that ask for the same to the last bit get what was found for the first of them."""
    found: dict[bytes, Any] = {}

    def remembered(**arguments: Any) -> Any:
        key = pickle.dumps(arguments)
        if key not in found:
            found[key] = assign(**arguments)
        return found[key]

    monkeypatch.setattr("hf_dflop.data.sampler.assign", remembered)


class Simulation:
    """`RANKS` ranks that draw `ahead` microbatches more than they train on, as loader workers do."""

    def __init__(
        self, model: CostModel, *, every: int = 10, rebalances: bool = False, slowness: tuple[float, ...] = (1.0,) * 4,
        padded: bool = False, ahead: int = 5, noise: float = 0.05,
    ) -> None:  # fmt: skip
        order = np.random.default_rng(1).permutation(len(SHAPES)).reshape(-1, RANKS, SIZE)
        self.stock = [order[:, rank].tolist() for rank in range(RANKS)]
        self.samplers = [
            BalancedBatchSampler(
                lambda: self.stock, SHAPES, model, rank=rank, num_ranks=RANKS, num_slots=SLOTS, length=EPOCH * SLOTS,
                objective="step", padded=padded, caps=stock_caps(SHAPES, 2 * SIZE),
            )
            for rank in range(RANKS)
        ]  # fmt: skip
        self.corrections = [
            Correction(s.costs, num_ranks=RANKS, steps_per_epoch=EPOCH, every=every, rebalances=rebalances)
            for s in self.samplers
        ]
        self.slowness, self.ahead, self.noise = slowness, ahead, noise
        self.true = CostVersion(number=0, from_step=0, model=TRUE)
        self.rng = np.random.default_rng(2)
        self.steps: list[MeasuredStep] = []
        self.idle: list[float] = []
        self.drawn: list[list[list[int]]] = []

    def run(self, num_steps: int) -> None:
        for position in range(len(self.idle), len(self.idle) + num_steps):
            epoch, step = divmod(position, EPOCH)
            if step == 0:
                for sampler in self.samplers:
                    sampler.set_epoch(epoch)
                self.streams = [iter(sampler) for sampler in self.samplers]
                self.buffers: list[list[list[int]]] = [[] for _ in self.samplers]
            loaded = []
            for stream, buffer in zip(self.streams, self.buffers, strict=True):
                buffer += itertools.islice(stream, max(0, SLOTS + self.ahead - len(buffer)))
                loaded.append([buffer.pop(0) for _ in range(SLOTS)])
            self.drawn.append([group for slots in loaded for group in slots])
            plan = self.samplers[0].plan_of(epoch, step)
            assert [plan.microbatches(rank) for rank in range(RANKS)] == loaded
            true = np.array(
                [self.samplers[0].costs.module_seconds(slots, self.true).sum(axis=1) for slots in loaded]
            )  # (RANKS, SLOTS)
            true *= np.array(self.slowness)[:, None]
            busy = true.sum(axis=1)
            self.idle.append(float(1 - busy.mean() / busy.max()))
            slot_s = true * self.rng.lognormal(0, self.noise, true.shape)
            slot_s[self.rng.random(true.shape) < 0.03] *= 3.0
            seconds = np.stack([0 * busy, busy, busy.max() - busy + 0.001, 0 * busy + busy.max() + 0.001], axis=1)
            self.steps.append(self.measured(position + 1, epoch, plan, seconds, slot_s))
            if self.corrections[0].is_due(position + 1):
                new, self.steps = self.steps, []
                for correction in self.corrections:
                    correction.see(new)
                    correction.learn()

    def measured(self, step: int, epoch: int, plan: Any, seconds: Any, slot_s: Any) -> MeasuredStep:
        return MeasuredStep(
            step=step, epoch=epoch, plan=plan, seconds=seconds, slot_s=slot_s,
            planned_through=np.array([s.costs.planned_through for s in self.samplers]),
            digest=np.array([digest_of(s.costs) for s in self.samplers]),
        )  # fmt: skip

    def late(self) -> float:
        """Mean idle share of the last ten steps."""
        return float(np.mean(self.idle[-10:]))


@pytest.mark.parametrize("padded", [False, True])
def test_costs_wrong_by_two_in_one_module_are_as_good_as_the_true_ones_after_fifty_steps(padded: bool) -> None:
    corrected, wrong, oracle = (
        Simulation(model, every=every, padded=padded) for model, every in ((WRONG, 10), (WRONG, 0), (TRUE, 0))
    )
    for simulation in (corrected, wrong, oracle):
        simulation.run(60)
    assert wrong.late() > oracle.late() + 0.06
    assert corrected.late() <= oracle.late() + 0.03, (corrected.late(), oracle.late(), wrong.late())
    for step, drawn in enumerate(corrected.drawn):  # and the samples of every step are the stock run's
        begin = step % EPOCH * SLOTS
        stock = [i for rank in corrected.stock for group in rank[begin : begin + SLOTS] for i in group]
        assert sorted(i for group in drawn for i in group) == sorted(stock)
    versions = [sampler.costs.newest for sampler in corrected.samplers]
    assert versions[0].number >= 1
    assert all(version == versions[0] for version in versions)
    print("idle: corrected", corrected.late(), "wrong", wrong.late(), "oracle", oracle.late())


def test_true_costs_are_left_alone() -> None:
    simulation = Simulation(TRUE)
    simulation.run(60)
    oracle = Simulation(TRUE, every=0)
    oracle.run(60)
    assert simulation.late() <= oracle.late() + 0.02
    assert simulation.samplers[0].costs.newest.number <= 3


def test_a_slow_rank_is_named_or_gets_less_work(caplog: pytest.LogCaptureFixture) -> None:
    slowness = (1.0, 1.0, 1.3, 1.0)
    with caplog.at_level(logging.WARNING, "hf_dflop"):
        named = Simulation(TRUE, slowness=slowness)
        named.run(50)
    assert caplog.text.count("rank 2 is slow: it takes 1.") == RANKS  # each simulated rank says it
    assert named.corrections[0].logs()["dflop/slow_rank"] == 2
    assert set(named.corrections[0].logs()) == set(LOG_KEYS)
    assert named.late() > 0.15
    balanced = Simulation(TRUE, slowness=slowness, rebalances=True)
    balanced.run(50)
    assert balanced.late() < named.late() / 2, (balanced.late(), named.late())
    line = straggler_line(named.steps or [named.measured(50, 1, None, *_last(named))], named.samplers[0].costs)
    assert line is not None
    assert "waited for rank 2 in " in line


def learn(simulation: Simulation) -> None:
    """Rank 0 learns from what was measured so far, in a simulation that does not do so by itself."""
    simulation.corrections[0]._every = 10
    simulation.corrections[0].see(simulation.steps)
    simulation.corrections[0].learn()


def _last(simulation: Simulation) -> tuple[Any, Any]:
    busy = np.array(simulation.slowness)
    return np.stack([0 * busy, busy, busy.max() - busy, 0 * busy + busy.max()], axis=1), np.full((RANKS, SLOTS), 0.5)


@pytest.mark.parametrize("bad", [np.nan, -1.0])
def test_useless_times_do_no_harm_and_are_told(bad: float, caplog: pytest.LogCaptureFixture) -> None:
    simulation = Simulation(TRUE, every=0)
    simulation.run(20)
    for step in simulation.steps:
        step.slot_s[:] = bad
    with caplog.at_level(logging.WARNING, "hf_dflop"):
        learn(simulation)
    assert "144 of 144 microbatches have no usable time" in caplog.text
    assert simulation.samplers[0].costs.newest.number == 0


def test_alike_microbatches_do_no_harm_and_are_told(caplog: pytest.LogCaptureFixture) -> None:
    simulation = Simulation(TRUE, every=0)
    simulation.run(20)
    one = simulation.steps[0].plan
    correction = simulation.corrections[0]
    correction._costs.microbatch_flops = lambda groups: np.ones((len(groups), 4)) * 1e6  # type: ignore[method-assign]
    for step in simulation.steps:
        step.slot_s[:] = 0.1
    with caplog.at_level(logging.WARNING, "hf_dflop"):
        learn(simulation)
    assert "do not tell these costs apart" in caplog.text
    rates = correction._costs.newest.model.rates
    assert rates.vision_linear / TRUE.rates.vision_linear == pytest.approx(
        rates.llm_linear / TRUE.rates.llm_linear, rel=0.05
    )
    assert one.cost_version.number == 0


def test_ranks_that_disagree_stop_the_run() -> None:
    simulation = Simulation(TRUE, every=0)
    simulation.run(3)
    simulation.steps[-1].digest[1] += 1
    with pytest.raises(TrainerError, match="cost versions differ"):
        learn(simulation)


def test_a_checkpoint_brings_back_versions_in_force_and_to_come() -> None:
    whole = Simulation(WRONG, ahead=9)
    whole.run(10)
    state = SimpleNamespace(stateful_callbacks={}, global_step=10)
    whole.corrections[0].remember(state)
    state.stateful_callbacks = json.loads(json.dumps(state.stateful_callbacks))
    kept = state.stateful_callbacks[KEY]["attributes"]["versions"]
    assert [version["number"] for version in kept] == [0, 1]
    assert 10 < kept[1]["from_step"] < EPOCH
    resumed = Simulation(WRONG)
    resumed.corrections[0].restore(state)
    assert resumed.corrections[0].fit == whole.corrections[0].fit
    sampler = resumed.samplers[0]
    assert sampler.costs.newest == whole.samplers[0].costs.newest
    sampler.skip_to(10)
    expected = list(whole.samplers[0])
    assert list(sampler)[10 * SLOTS :] == expected[10 * SLOTS :]
    assert list(Simulation(WRONG).samplers[0])[10 * SLOTS :] != expected[10 * SLOTS :], "the version changes nothing"


def test_a_checkpoint_of_other_costs_ranks_or_steps() -> None:
    def restored(correction: Correction, **changes: Any) -> tuple[CostVersion, OnlineFitLike]:
        record = json.loads(json.dumps(state.stateful_callbacks[KEY]["attributes"])) | changes
        correction.restore(SimpleNamespace(stateful_callbacks={KEY: {"attributes": record}}, global_step=20))
        return correction._costs.newest, correction.fit

    whole = Simulation(WRONG, slowness=(1.0, 1.3, 1.0, 1.0), rebalances=True)
    whole.run(40)
    state = SimpleNamespace(stateful_callbacks={}, global_step=40)
    whole.corrections[0].remember(state)
    newest = whole.samplers[0].costs.newest
    assert newest.rank_speeds is not None
    version, _ = restored(Simulation(WRONG).corrections[0])
    assert version == newest
    version, fit = restored(Simulation(WRONG).corrections[0], num_ranks=8)
    assert version.rank_speeds is None
    assert fit.speeds.slowness == (1.0,) * RANKS
    assert version.model == newest.model
    version, _ = restored(Simulation(WRONG).corrections[0], steps_per_epoch=7)
    assert version.from_step == 0
    version, _ = restored(Simulation(TRUE).corrections[0])
    assert version.number == 0
    version, _ = restored(Simulation(WRONG).corrections[0], versions=[{"number": 1}])
    assert version.number == 0


OnlineFitLike = Any
Floats = npt.NDArray[np.float64]


def test_a_version_cannot_change_what_is_planned() -> None:
    simulation = Simulation(TRUE)
    simulation.run(3)
    costs = simulation.samplers[0].costs
    with pytest.raises(BalanceError, match="planned already"):
        costs.declare(CostVersion(number=1, from_step=costs.planned_through, model=WRONG))
    costs.declare(CostVersion(number=1, from_step=costs.planned_through + 1, model=WRONG))
    assert costs.at(costs.planned_through).number == 0
    assert costs.at(costs.planned_through + 1).number == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"when": "maybe"}, "correct='maybe'"),
        ({"every": 0}, "correct_every=0"),
        ({"slow_ranks": "ignore"}, "slow_ranks='ignore'"),
        ({"when": False, "slow_ranks": "rebalance"}, "needs measured times"),
    ],
)
def test_options_that_mean_nothing(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Correct(**({"when": "auto", "every": 10, "slow_ranks": "name"} | arguments))
