"""Rooflines that were computed by hand."""

from __future__ import annotations

import dataclasses
import json

import pytest
from typer.testing import CliRunner

from edgeadapt import settings
from edgeadapt.bundle import open_bundle
from edgeadapt.cli.app import app
from edgeadapt.device import Device, read_device
from edgeadapt.errors import BundleError, ProfileError
from edgeadapt.profiling import predict as predicting
from edgeadapt.profiling.graph_file import GraphFile, Node, Stored
from edgeadapt.profiling.predict import Calibration, Rate, calibration, device_rates, estimate, predict
from edgeadapt.profiling.work import GraphWork, Work, count

KNOWN = Calibration(
    schema="edgeadapt.calibration/1",
    reference={"title": "a machine", "operator_s": 4e-6, "clock_hz_assumed": 3e9},
    shares={"operator": 5.0, "bandwidth": 0.5, "int8": 0.25, "float32": 0.8},
    errors={"decode": 0.25, "prefill": 0.5},
    memory={"process_bytes": 100e6, "weights_4_bits": 2.0, "weights_8_bits": 1.5, "adapter": 3.0, "error": 0.25},
    widen={"measured": 1.1, "maker": 2.0, "clock": 2.5},
)
BOARD = Device(
    name="board", title="a board", provider="cpu", runtime="onnxruntime", clock_hz=1.5e9,
    memory_bandwidth_bytes_per_s=20e9, peak_flops_float32=100e9, peak_ops_int8=400e9,
)  # fmt: skip
MEASURED = dataclasses.replace(BOARD, measured=True, operator_overhead_s=1e-6)


def test_a_roofline_by_hand():
    rates = {"overhead": Rate(1e-6, 2), "memory": Rate(1e-9, 3), "int8": Rate(1e-12, 1), "float32": Rate(2e-12, 4)}
    found = estimate(Work(nodes=500, bytes=2_000_000, int8=3e8, float32=1e8), rates, 0.25)
    # 0.5 ms + 2 ms + (0.3 + 0.2) ms
    assert found.value == pytest.approx(3.0e-3)
    assert found.terms == pytest.approx({"overhead": 0.5e-3, "memory": 2e-3, "arithmetic": 0.5e-3})
    assert found.bound_by == "memory"
    assert found.low == pytest.approx((0.25e-3 + 2e-3 / 3 + 0.3e-3 + 0.05e-3) / 1.25)
    assert found.high == pytest.approx((1e-3 + 6e-3 + 0.3e-3 + 0.8e-3) * 1.25)


@pytest.mark.parametrize(
    ("work", "bound_by"),
    [
        (Work(1000, 1000, 1000, 0), "overhead"),
        (Work(1, 10**9, 1000, 0), "memory"),
        (Work(1, 1000, 10**12, 0), "arithmetic"),
        (Work(1, 1000, 0, 10**12), "arithmetic"),
    ],
)
def test_the_largest_part_binds(work, bound_by):
    assert estimate(work, device_rates(BOARD, KNOWN)[0], 0.1).bound_by == bound_by


def test_rates_of_a_makers_figures():
    rates, assumptions = device_rates(BOARD, KNOWN)
    # half of 20 GB/s, a quarter of 400 G/s, 0.8 of 100 G/s; half the clock: an operator takes twice as long
    assert rates["memory"] == Rate(pytest.approx(1 / 10e9), 2.0)
    assert rates["int8"] == Rate(pytest.approx(1 / 100e9), 2.0)
    assert rates["float32"] == Rate(pytest.approx(1 / 80e9), 2.0)
    assert rates["overhead"] == Rate(pytest.approx(8e-6), 2.5)
    assert len(assumptions) == 2


def test_rates_that_were_measured_are_surer():
    rates, assumptions = device_rates(MEASURED, KNOWN)
    assert rates["overhead"] == Rate(pytest.approx(5e-6), 1.1)
    assert {rate.widen for rate in rates.values()} == {1.1}
    assert assumptions == ()


def test_without_an_int8_rate_the_float32_one_counts():
    rates, assumptions = device_rates(dataclasses.replace(BOARD, peak_ops_int8=None), KNOWN)
    assert rates["int8"].seconds == pytest.approx(1 / 25e9)
    assert "no int8 rate" in assumptions[1]


@pytest.mark.parametrize("field", ["memory_bandwidth_bytes_per_s", "peak_flops_float32", "clock_hz"])
def test_what_is_not_known_is_not_guessed(field):
    with pytest.raises(ProfileError) as caught:
        device_rates(dataclasses.replace(BOARD, **{field: None}), KNOWN)
    assert caught.value.message == f"the file of device 'board' does not say {field}"
    assert "devices detect" in caught.value.hint


@pytest.mark.parametrize(("provider", "runtime"), [("cuda", "onnxruntime"), ("wasm", "web"), ("cpu", "node")])
def test_what_was_never_measured_is_not_predicted(provider, runtime):
    with pytest.raises(ProfileError, match="only ONNX Runtime on CPUs"):
        device_rates(dataclasses.replace(BOARD, provider=provider, runtime=runtime), KNOWN)


def _node(op_type, inputs, output="y", **attributes):
    return Node(output, op_type, tuple(inputs), (output,), attributes)


def test_a_graphs_work_by_hand():
    graph = GraphFile(
        nodes=(
            _node("GatherBlockQuantized", ["table", "ids"], "e"),
            _node("MatMulNBits", ["e", "qkv", "s"], "q", K=64, N=96, bits=4, accuracy_level=4),
            _node("GroupQueryAttention", ["q"], "a", num_heads=4),
            _node("MatMulNBits", ["a", "o"], "h", K=64, N=64, bits=8),
            _node("MatMul", ["a", "slot.A"], "r"),
            _node("MatMul", ["r", "slot.B"], "d"),
            _node("MatMul", ["h", "d"], "x"),  # of two activations
            _node("Gemm", ["h", "g"], "y", transB=1),
            _node("MatMulNBits", ["y", "head"], "logits", K=64, N=1000, bits=8, accuracy_level=4),
        ),
        stored={
            "table": Stored((1000, 64), 64000, "w@0"),
            "head": Stored((1000, 2, 32), 64000, "w@0"),  # tied: in the file once
            "qkv": Stored((96, 2, 16), 3072, "w@64000"),
            "s": Stored((192,), 768, "s"),
            "o": Stored((64, 2, 32), 4096, "o"),
            "g": Stored((10, 64), 2560, "g"),
            "unused": Stored((5,), 20, "unused"),
        },
        inputs=("ids",),
        outputs=("logits",),
    )
    adapter = {"slot.A": (64, 8), "slot.B": (8, 64)}
    found = count(graph, adapter=adapter, once_width=1000)
    assert found == GraphWork(
        nodes=9,
        weight_bytes=64000 + 3072 + 768 + 4096 + 2560 + 4 * 1024,
        adapter_bytes=4 * 1024,
        lowest_bits=4,
        int8_per_row=2 * 64 * 96,
        int8_once=2 * 64 * 1000,
        float32_per_row=2 * 64 * 64 + 2 * 1024 + 2 * 640,
        float32_once=0,
        float32_per_pair=4 * 64,
    )
    step = found.of(1, texts=2, context=9, cache_bytes_per_row=100)
    assert step == Work(
        nodes=9,
        bytes=found.weight_bytes + 2 * 10 * 100,
        int8=2 * (12288 + 128000),
        float32=2 * (found.float32_per_row + 10 * 256),
    )
    assert found.of(4).float32 == 4 * found.float32_per_row + 16 * 256


def test_arithmetic_that_cannot_be_counted_is_refused():
    graph = GraphFile((_node("Conv", ["x", "w"]), _node("LSTM", ["x"])), {}, ("x",), ("y",))
    with pytest.raises(ProfileError, match="the arithmetic of Conv, LSTM depends on sizes"):
        count(graph, adapter={})
    attention = GraphFile((_node("MultiHeadAttention", ["x"], "a"),), {}, ("x",), ("a",))
    with pytest.raises(ProfileError, match="no product with weights reads it"):
        count(attention, adapter={})


def test_a_bundle_is_predicted(decoder, monkeypatch):
    monkeypatch.setattr(predicting, "calibration", lambda: KNOWN)
    plain, active = predict(decoder, device=BOARD), predict(decoder, device=BOARD, adapter="a")
    graph = predicting.counted(open_bundle(decoder), "a")
    tensors = open_bundle(decoder).graph_tensors("a")
    assert graph.adapter_bytes == sum(4 * value.size for value in tensors.values()) > 0
    for found in (plain, active):
        assert found.predicted
        for part in (found.ttft_s, found.latency_s):
            assert part.low < part.value < part.high
        assert found.decode_tokens_per_s == 1 / found.latency_s.value
    assert active.latency_s.terms["overhead"] > plain.latency_s.terms["overhead"]
    assert active.latency_s.terms["arithmetic"] > plain.latency_s.terms["arithmetic"]
    assert predict(decoder, device=BOARD, prompt_tokens=256).ttft_s.value > plain.ttft_s.value
    twice = predict(decoder, device=BOARD, batch_size=2).latency_s.terms
    assert twice["arithmetic"] == pytest.approx(2 * plain.latency_s.terms["arithmetic"])
    assert twice["overhead"] == plain.latency_s.terms["overhead"]
    with pytest.raises(BundleError):
        predict(decoder, device=BOARD, adapter="nobody")
    with pytest.raises(ProfileError, match="batch_size is 0"):
        predict(decoder, device=BOARD, batch_size=0)


def test_a_single_pass_has_no_first_token(classifier):
    found = predict(classifier, device="raspberry-pi-5", adapter="a")
    assert found.ttft_s is None
    assert found.decode_tokens_per_s is None
    assert found.latency_s.value > 0


def test_several_graphs_are_refused(seq2seq):
    with pytest.raises(ProfileError, match="only bundles of one graph can be predicted"):
        predict(seq2seq, device="raspberry-pi-5")


def test_memory_by_hand():
    graph = GraphWork(10, 50_000_000, 10_000_000, 4, 0, 0, 0, 0, 0)
    found = predicting._memory(graph, 7_000_000, KNOWN.memory)
    assert found.terms == {"process": 100_000_000, "weights": 80_000_000, "adapter": 30_000_000, "cache": 7_000_000}
    assert (found.value, found.low, found.high) == (217_000_000, 173_600_000, 271_250_000)
    assert predicting._memory(dataclasses.replace(graph, lowest_bits=32), 0, KNOWN.memory) is None


def test_the_calibration_that_ships():
    known = calibration()
    assert set(known.shares) == {"operator", "bandwidth", "int8", "float32"}
    assert all(0 < known.shares[name] <= 1.5 for name in ("bandwidth", "int8", "float32"))
    assert 0 < known.errors["decode"] < 0.5
    assert 0 < known.errors["prefill"] < 0.5
    predictable = 0
    for name in settings.names("devices"):
        try:
            device_rates(read_device(name), known)
        except ProfileError:
            continue
        predictable += 1
    assert predictable >= 4, "no rates for the devices that ship"


def test_the_command_says_that_it_predicts(decoder):
    runner = CliRunner()
    arguments = ["predict", str(decoder), "--device", "raspberry-pi-5", "--adapter", "a"]
    table = runner.invoke(app, arguments)
    assert table.exit_code == 0, table.stderr
    assert table.stdout == ""
    for text in ("predicted, not measured", "bound by", "assumed: an operator takes as many cycles"):
        assert text in table.stderr
    told = json.loads(runner.invoke(app, [*arguments, "--json"]).stdout)
    assert told["predicted"] is True
    assert told["latency_s"]["low"] < told["latency_s"]["value"] < told["latency_s"]["high"]
    assert told["latency_s"]["bound_by"] in told["latency_s"]["terms"]
    refused = runner.invoke(app, ["predict", str(decoder), "--device", "h200-server"])
    assert refused.exit_code == 1
    assert "only ONNX Runtime on CPUs was measured" in " ".join(refused.stderr.split())
