"""AdamW's schedule, its clipping and what it does about a gradient that is not finite."""

import math
from collections.abc import Sequence
from typing import Any, Literal

import pytest
import torch

from lesft.errors import BundleError, InvalidInput
from lesft.optimizer import Optimizer, learning_rate_factor
from lesft.spec import OptimizerSpec

ROUNDS = 6
HALF_SQRT_2, HALF_SQRT_3 = math.sqrt(2) / 2, math.sqrt(3) / 2


# ---------------------------------------------------------------------- the schedule


@pytest.mark.parametrize(
    ("schedule", "warmup_rounds", "factors"),
    [
        ("constant", 0, [1, 1, 1, 1, 1, 1]),
        ("constant", 2, [1 / 3, 2 / 3, 1, 1, 1, 1]),
        ("linear", 0, [1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]),
        ("linear", 2, [1 / 3, 2 / 3, 1, 3 / 4, 2 / 4, 1 / 4]),
        (
            "cosine",
            0,
            [1, (1 + HALF_SQRT_3) / 2, 0.75, 0.5, 0.25, (1 - HALF_SQRT_3) / 2],
        ),
        (
            "cosine",
            2,
            [1 / 3, 2 / 3, 1, (1 + HALF_SQRT_2) / 2, 0.5, (1 - HALF_SQRT_2) / 2],
        ),
        ("linear", 6, [1 / 7, 2 / 7, 3 / 7, 4 / 7, 5 / 7, 6 / 7]),
        ("cosine", 9, [1 / 10, 2 / 10, 3 / 10, 4 / 10, 5 / 10, 6 / 10]),
    ],
)
def test_the_learning_rate_follows_its_schedule(
    schedule: Literal["constant", "linear", "cosine"],
    warmup_rounds: int,
    factors: Sequence[float],
) -> None:
    spec = OptimizerSpec(schedule=schedule, warmup_rounds=warmup_rounds)
    actual = [learning_rate_factor(spec, index, ROUNDS) for index in range(ROUNDS)]
    assert actual == pytest.approx(factors, rel=1e-12)


def test_every_step_uses_the_learning_rate_of_its_round() -> None:
    """AdamW moves by the learning rate where the gradient has one sign all the time."""
    parameter, optimizer = one_parameter(
        [0.0], learning_rate=0.1, schedule="linear", warmup_rounds=2
    )
    moves = []
    for round_index in (0, 1, 2, 4, 5):  # one was missed
        before = parameter.item()
        parameter.grad = torch.tensor([1.0])
        optimizer.step(round_index)
        moves.append(before - parameter.item())
    factors = [1 / 3, 2 / 3, 1, 2 / 4, 1 / 4]
    assert moves == pytest.approx([0.1 * factor for factor in factors], rel=1e-4)


def test_steps_are_those_of_adamw() -> None:
    """Two moments with bias correction and decoupled weight decay, by hand."""
    parameter, optimizer = one_parameter([2.0], learning_rate=0.1, weight_decay=0.5)
    value, first, second = 2.0, 0.0, 0.0
    for step, gradient in enumerate([0.5, -0.25, 0.125], start=1):
        take_step(parameter, optimizer, [gradient])
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * gradient**2
        value -= 0.1 * 0.5 * value
        corrected = math.sqrt(second / (1 - 0.999**step))
        value -= 0.1 * first / (1 - 0.9**step) / (corrected + 1e-8)
        assert parameter.item() == pytest.approx(value, rel=1e-5)


# ---------------------------------------------------------------------- clipping


@pytest.mark.parametrize(
    ("max_grad_norm", "used"),
    [(1.0, [0.6, 0.8]), (2.5, [1.5, 2.0]), (10.0, [3.0, 4.0]), (0.0, [3.0, 4.0])],
)
def test_the_gradient_is_clipped_to_its_norm_unless_that_is_turned_off(
    max_grad_norm: float, used: Sequence[float]
) -> None:
    """The gradient (3, 4) has norm 5, over two parameters; AdamW's first moment shows its use."""
    parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    optimizer = Optimizer(parameters, OptimizerSpec(max_grad_norm=max_grad_norm), ROUNDS)
    for parameter, gradient in zip(parameters, [3.0, 4.0], strict=True):
        parameter.grad = torch.tensor([gradient])
    assert optimizer.step(0) == pytest.approx(5.0)
    state = adamw(optimizer).state
    moments = [state[parameter]["exp_avg"].item() for parameter in parameters]
    assert moments == pytest.approx([0.1 * gradient for gradient in used], rel=1e-5)


def test_a_step_forgets_the_gradient() -> None:
    parameter, optimizer = one_parameter([0.0])
    take_step(parameter, optimizer, [1.0])
    assert parameter.grad is None


def test_a_side_that_got_no_gradient_stays_as_it_is() -> None:
    parameter, optimizer = one_parameter([2.0], weight_decay=0.5)
    assert optimizer.step(0) == 0.0
    assert parameter.tolist() == [2.0]


def test_a_dropped_gradient_is_not_used() -> None:
    parameter, optimizer = one_parameter([0.0])
    parameter.grad = torch.tensor([1.0])
    optimizer.drop_gradients()
    assert parameter.grad is None
    assert optimizer.steps == 0


# ---------------------------------------------------------------------- going on from a state


def test_a_state_goes_on_with_the_steps_the_moments_and_the_schedule() -> None:
    """See tests/model/test_training_state.py for whole parts of a model."""
    options: dict[str, Any] = {"schedule": "linear", "warmup_rounds": 2, "weight_decay": 0.5}
    parameter, optimizer = one_parameter([2.0, -1.0], **options)
    for gradient in ([0.5, 1.0], [-0.25, 3.0], [0.1, 0.2]):
        take_step(parameter, optimizer, gradient)
    state = optimizer.state({"x": parameter})
    assert state.keys() == {"optimizer.steps", "exp_avg.x", "exp_avg_sq.x"}
    assert state["optimizer.steps"].tolist() == [3]

    resumed, its_optimizer = one_parameter(parameter.tolist(), **options)
    its_optimizer.load_state({"x": resumed}, state)
    assert its_optimizer.steps == 3
    for gradient in ([1.0, 0.0], [2.0, -1.0], [0.5, 0.5]):
        take_step(parameter, optimizer, gradient)
        take_step(resumed, its_optimizer, gradient)
        assert torch.equal(resumed, parameter)
    # Bit for bit, AdamW's own count of steps included: it corrects the moments' bias with it.
    ours, theirs = adamw(its_optimizer).state[resumed], adamw(optimizer).state[parameter]
    assert ours.keys() == theirs.keys()
    for name in theirs:
        assert ours[name].dtype == theirs[name].dtype
        assert torch.equal(ours[name], theirs[name])


def test_before_the_first_step_a_state_holds_no_moments_and_forgets_those_there_are() -> None:
    parameter, optimizer = one_parameter([1.0])
    state = optimizer.state({"x": parameter})
    assert {name: tensor.tolist() for name, tensor in state.items()} == {"optimizer.steps": [0]}
    take_step(parameter, optimizer, [1.0])
    parameter.grad = torch.tensor([5.0])
    optimizer.load_state({"x": parameter}, state)
    assert optimizer.steps == 0
    assert parameter.grad is None
    assert not adamw(optimizer).state


def test_a_state_of_another_shape_is_refused_and_changes_nothing() -> None:
    parameter, optimizer = one_parameter([1.0, 2.0])
    other, its_optimizer = one_parameter([1.0])
    take_step(parameter, optimizer, [1.0, 1.0])
    take_step(other, its_optimizer, [1.0])
    before = optimizer.state({"x": parameter})
    parameter.grad = torch.tensor([3.0, 4.0])
    with pytest.raises(BundleError, match=r"'exp_avg.x' must have shape \[2\], got \[1\]"):
        optimizer.load_state({"x": parameter}, its_optimizer.state({"x": other}))
    after = optimizer.state({"x": parameter})
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert parameter.grad.tolist() == [3.0, 4.0]


# ---------------------------------------------------------------------- gradients not finite


@pytest.mark.parametrize(
    ("gradient", "norm"),
    [([math.nan, 1.0], "nan"), ([1.0, -math.inf], "inf"), ([3e38, 3e38], "inf")],
)
@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])
def test_a_gradient_that_is_not_finite_is_refused_and_changes_nothing(
    gradient: list[float], norm: str, max_grad_norm: float
) -> None:
    options: dict[str, Any] = {"max_grad_norm": max_grad_norm, "schedule": "linear"}
    parameter, optimizer = one_parameter([1.0, 2.0], **options)
    twin, undisturbed = one_parameter([1.0, 2.0], **options)
    for each, its_optimizer in ((parameter, optimizer), (twin, undisturbed)):
        take_step(each, its_optimizer, [0.5, -0.5])

    parameter.grad = torch.tensor(gradient)
    with pytest.raises(InvalidInput) as raised:
        optimizer.step(1)
    assert str(raised.value) == (
        f"the gradient's norm must be finite, got {norm}: lower optimizer.learning_rate or set "
        "optimizer.max_grad_norm, which clips the gradient"
    )
    assert torch.equal(parameter, twin)
    torch.testing.assert_close(
        parameter.grad, torch.tensor(gradient), rtol=0, atol=0, equal_nan=True
    )

    for each, its_optimizer in ((parameter, optimizer), (twin, undisturbed)):
        take_step(each, its_optimizer, [0.25, 0.5])
    assert torch.equal(parameter, twin), "moments and schedule were left alone too"


# ---------------------------------------------------------------------- what the tests share


def one_parameter(values: list[float], **options: Any) -> tuple[torch.nn.Parameter, Optimizer]:
    parameter = torch.nn.Parameter(torch.tensor(values))
    return parameter, Optimizer([parameter], OptimizerSpec(**options), ROUNDS)


def take_step(parameter: torch.nn.Parameter, optimizer: Optimizer, gradient: list[float]) -> None:
    parameter.grad = torch.tensor(gradient)
    optimizer.step(optimizer.steps)


def adamw(optimizer: Optimizer) -> torch.optim.AdamW:
    return optimizer._adamw
