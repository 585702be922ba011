import math

import pytest
import torch

from emp_fast.random import Stream, gumbel, random_keys

CPU = torch.device("cpu")


def keys(n, seed=0, epoch=0, stream=Stream.RANDOM, start=0):
    return random_keys(n, seed=seed, epoch=epoch, stream=stream, start=start, device=CPU)


def test_keys_are_finite_floats_in_uniform_order():
    drawn = keys(100_000)
    assert torch.isfinite(drawn).all()
    assert (drawn >= 0).all()
    patterns = drawn.view(torch.int32).double() / 0x7F800000
    assert patterns.mean().item() == pytest.approx(0.5, abs=0.005)
    assert patterns.var().item() == pytest.approx(1 / 12, abs=0.002)


def test_a_sample_draws_the_same_wherever_the_range_starts(monkeypatch):
    whole = keys(1000)
    assert torch.equal(whole[300:700], keys(400, start=300))
    monkeypatch.setattr("emp_fast.random._CPU_BLOCK", 64)
    assert torch.equal(whole, keys(1000))


def test_seed_epoch_and_use_all_matter():
    drawn = [keys(100), keys(100, seed=1), keys(100, epoch=1), keys(100, stream=Stream.SHUFFLE)]
    drawn += [keys(100, seed=2**32), keys(100, seed=-1)]
    for i, first in enumerate(drawn):
        for second in drawn[:i]:
            assert (first == second).float().mean() < 0.05


def test_every_use_keeps_its_numbers_from_version_to_version():
    """A run that resumes with a later version goes on with the same samples in the same order."""
    drawn = {
        name: random_keys(2, seed=3, epoch=5, stream=stream, device=CPU).view(torch.int32).tolist()
        for name, stream in Stream.__members__.items()
    }
    assert drawn == {
        "UNVISITED": [1025251830, 717778209],
        "RANDOM": [1636927719, 177464270],
        "EPSILON": [218797676, 912405006],
        "GUMBEL": [1628896181, 1367157792],
        "BELOW_MEAN": [1510865437, 937762358],
        "STRATIFIED": [381611555, 1908857316],
        "WINDOW": [1805350287, 222456286],
        "SHUFFLE": [1271490633, 171068130],
    }


def test_gumbel_noise_is_gumbel():
    noise = gumbel(200_000, seed=0, epoch=0, stream=Stream.GUMBEL, device=CPU).double()
    assert noise.mean().item() == pytest.approx(0.5772156649, abs=0.01)
    assert noise.var().item() == pytest.approx(math.pi**2 / 6, abs=0.03)


def test_the_logarithm_of_basic_operations_is_the_logarithm():
    from emp_fast.random import _exact_log

    x = torch.cat(
        [torch.logspace(-300, 300, 5001, dtype=torch.float64), torch.tensor([1.0]).double()]
    )
    torch.testing.assert_close(_exact_log(x), x.log(), rtol=1e-15, atol=0)
    near_one = 1 + torch.linspace(-1e-3, 1e-3, 2001, dtype=torch.float64)
    torch.testing.assert_close(_exact_log(near_one), near_one.log(), rtol=1e-13, atol=1e-18)


def test_every_step_of_the_logarithm_is_rounded_by_itself():
    """As in plain Python, to the bit: a fused or reordered step would change a selection."""
    from emp_fast.random import _exact_log

    def logarithm(x: float) -> float:
        mantissa, exponent = math.frexp(x)
        if mantissa < 0.7071067811865476:
            mantissa, exponent = 2 * mantissa, exponent - 1
        ratio = (mantissa - 1) / (mantissa + 1)
        series = 0.0
        for power in range(25, 0, -2):
            series = series * (ratio * ratio) + 1 / power
        return 2 * ratio * series + exponent * 0.6931471805599453

    x = torch.logspace(-30, 3, 3001, dtype=torch.float64)
    assert _exact_log(x).tolist() == [logarithm(one) for one in x.tolist()]
