import pytest

from mmjax.monitor import flops
from mmjax.monitor.flops import MEASURED, Peak
from mmjax.monitor.meter import Meter


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def test_meter_leaves_out_the_first_step_and_the_pauses():
    clock = Clock()
    meter = Meter(11, peak=Peak(1000.0, "data sheet"), clock=clock)
    clock.now += 30  # compiles
    meter.step(tokens=100)
    assert meter.report() == {} and meter.eta() is None
    for _ in range(4):
        with meter.wait():
            clock.now += 0.5
        clock.now += 1.5
        meter.step(tokens=100, images=2, samples=4, flops=200.0)
    with meter.pause():
        clock.now += 12
    assert meter.report() == pytest.approx(
        {
            "perf/step_s": 2.0,
            "perf/data_wait_s": 0.5,
            "perf/tok_s": 50.0,
            "perf/img_s": 1.0,
            "perf/sample_s": 2.0,
            "perf/mfu": 0.1,
        }
    )
    # 6 steps to go, 20 seconds were spent on 4
    assert meter.eta() == pytest.approx(30.0)
    assert meter.report() == {}


@pytest.mark.parametrize("source, shares", [(MEASURED, (1.0, 0.5)), ("data sheet", (1.5, 0.75))])
def test_a_measured_peak_is_no_less_than_what_steps_reach(source, shares):
    clock = Clock()
    meter = Meter(9, peak=Peak(100.0, source), clock=clock)
    meter.step()  # compiles
    found = []
    for seconds in (2.0, 4.0):
        clock.now += seconds
        meter.step(flops=300.0)
        found.append(meter.report()["perf/mfu"])
    assert tuple(found) == shares


def test_meter_without_a_peak_has_no_mfu():
    clock = Clock()
    meter = Meter(10, start_step=5, clock=clock)
    meter.step()
    clock.now += 1
    meter.step(tokens=8, flops=1e9)
    assert "perf/mfu" not in meter.report()
    assert meter.eta() == pytest.approx(3.0)


@pytest.mark.parametrize(
    ("kind", "dtype", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989e12),
        ("NVIDIA H200", "bfloat16", 989e12),
        ("NVIDIA H100 PCIe", "bfloat16", 756e12),
        ("NVIDIA A100-SXM4-80GB", "bfloat16", 312e12),
        ("NVIDIA A100-SXM4-80GB", "float32", 156e12),
        ("cpu", "float32", None),
        ("NVIDIA L4", "bfloat16", 121e12),
        ("NVIDIA L40", "bfloat16", None),  # no L4
        ("Quadro of tomorrow", "bfloat16", None),
    ],
)
def test_peaks_by_device_kind(kind, dtype, peak):
    assert flops.table_peak(kind, dtype) == peak


def test_cpu_peak_is_measured_or_unknown():
    measured = flops.find_peak(dtype="float32")
    assert measured.source == "measured" and measured.flops > 1e8
    assert flops.find_peak(dtype="float32", measure=False) is None
