"""Structure and sanity; how fast the machine is, is nobody's business here."""

from __future__ import annotations

import dataclasses
import json
import sys
from statistics import median

import numpy as np
import onnxruntime
import pytest

from edgeadapt import registry
from edgeadapt.device import Device
from edgeadapt.errors import BundleError, ProfileError
from edgeadapt.fields import from_mapping
from edgeadapt.profiling import Profile, launch, profile, rows
from edgeadapt.profiling.device_side.engines import onnxruntime as engine
from edgeadapt.profiling.figures import Prefill
from edgeadapt.profiling.profile import RUNTIMES
from edgeadapt.runtime import ort

SMALL = {"threads": 1, "prompt_tokens": 8, "new_tokens": 5, "repeats": 2}


@pytest.fixture(scope="module")
def of_decoder(decoder):
    return profile(decoder, adapter="b", **SMALL)


@pytest.fixture(scope="module")
def of_classifier(classifier):
    return profile(str(classifier), device="cpu", **SMALL)


def test_a_decoders_figures_follow_from_its_samples(of_decoder):
    found = of_decoder
    assert (found.bundle, found.task, found.adapter, found.threads) == ("a decoder.bundle", "text-generation", "b", 1)
    samples = found.samples
    assert {name: len(values) for name, values in samples.items()} == {
        "ttft_8_s": 2,
        "latency_s": 10,
        "tax_base_s": 4,
        "tax_active_s": 4,
        "tax_idle_s": 4,
        "swap_resident_s": 10,
        "swap_from_disk_s": 10,
        "swap_blend_s": 10,
    }
    assert all(value > 0 for values in samples.values() for value in values)
    assert found.ttft_s == median(samples["ttft_8_s"])
    assert found.prefill_tokens_per_s == pytest.approx(8 / median(samples["ttft_8_s"]))
    answers = [sum(samples["latency_s"][:5]), sum(samples["latency_s"][5:])]
    assert found.decode_tokens_per_s == pytest.approx(5 / median(answers))
    percentiles = [found.latency_p50_s, found.latency_p90_s, found.latency_p95_s, found.latency_p99_s]
    assert percentiles == pytest.approx(np.percentile(samples["latency_s"], [50, 90, 95, 99]))
    pairs = zip(samples["tax_active_s"], samples["tax_base_s"], strict=True)
    assert found.adapter_tax.ratio == pytest.approx(median(a / b for a, b in pairs))
    assert (found.adapter_tax.adapter, found.swap.adapter) == ("b", "b")
    assert found.swap.resident_s == median(samples["swap_resident_s"])
    assert found.swap.from_disk_s == median(samples["swap_from_disk_s"])
    assert found.load_time_s > 0
    assert found.process_start_s > 0
    assert found.first_run_s > 0


def test_memory_grows_from_stage_to_stage(of_decoder):
    memory = of_decoder.memory
    if not sys.platform.startswith("linux"):
        pytest.skip("memory is read from /proc")
    assert 10e6 < memory.before_load_resident_bytes < memory.loaded_resident_bytes <= memory.peak_resident_bytes
    assert memory.run_resident_bytes <= memory.peak_resident_bytes < 1e9
    assert 0 < memory.loaded_proportional_bytes <= memory.loaded_resident_bytes
    assert list(memory.further_adapters_resident_bytes) == ["a"]
    assert memory.kv_cache_bytes_per_token == 2 * 2 * 2 * 16 * 4  # layers, key and value, heads, dim, float32


def test_sizes_are_those_of_the_files(decoder, of_decoder):
    sizes = of_decoder.sizes
    assert sizes.total_bytes == sum(path.stat().st_size for path in decoder.rglob("*") if path.is_file())
    assert sizes.by_role_bytes["weights"] == (decoder / "graph" / "weights.bin").stat().st_size
    assert sizes.by_adapter_bytes == {
        name: (decoder / "adapters" / name / "adapter.onnx_adapter").stat().st_size for name in ("a", "b")
    }


def test_host_and_versions(of_decoder):
    host = of_decoder.host
    assert host.cores >= 1
    assert host.machine
    assert set(host.versions) == {"edgeadapt", "python", "numpy", "session"}
    assert host.versions["session"] == ort.version()


def test_a_single_pass_has_no_tokens(of_classifier):
    found = of_classifier
    assert found.adapter is None
    assert found.ttft_s is None
    assert found.prefill_tokens_per_s is None
    assert found.decode_tokens_per_s is None
    assert len(found.samples["latency_s"]) == 20
    assert found.adapter_tax.adapter == "a"
    assert len(found.samples["tax_base_s"]) == 4
    assert "ttft_8_s" not in found.samples


def test_a_seq2seq_model_without_adapters(seq2seq):
    found = profile(seq2seq, **SMALL)
    assert found.ttft_s == median(found.samples["ttft_8_s"])
    assert found.prefill_tokens_per_s is None
    assert found.decode_tokens_per_s > 0
    assert (found.adapter_tax, found.swap) == (None, None)
    assert found.memory.further_adapters_resident_bytes == {}


def test_a_merged_bundle_has_no_tax(helpers, tmp_path):
    path = tmp_path / "merged.bundle"
    helpers[1].write_decoder(path, {}, merged="support")
    found = profile(path, **SMALL)
    assert (found.adapter, found.adapter_tax, found.swap) == ("support", None, None)
    with pytest.raises(ProfileError) as caught:
        profile(path, adapter="sales", **SMALL)
    assert str(caught.value) == (
        "adapter 'sales' cannot be used: 'support' is merged into the weights of this bundle\nHint: leave --adapter out"
    )


@pytest.mark.parametrize("name", ["of_decoder", "of_classifier"])
def test_json_there_and_back(name, request):
    found = request.getfixturevalue(name)
    text = json.dumps(found.to_json(), allow_nan=False)
    assert from_mapping(Profile, json.loads(text), "profile", ProfileError) == found


def test_rows_for_people(of_decoder, of_classifier):
    figures = [row["figure"] for row in rows(of_decoder)]
    cold = ["load, files only on storage"] if of_decoder.cold_load_time_s is not None else []
    system = ("energy while timing", "clock", "temperature")
    assert [name for name in figures if name not in system] == [
        "process start",
        "load",
        *cold,
        "first run",
        "time to first token (8 prompt tokens)",
        "prefill (8 prompt tokens)",
        "decode (5 new tokens)",
        "latency per token, p50 / p90 / p95 / p99",
        "time with adapter b against none",
        "time with adapters in place, none active",
        "swap to b, from memory / from disk",
        "swap to a blend with b",
        "memory before load",
        "memory after load",
        "memory after a run",
        "of it the process's own",
        "of it mapped files",
        "memory at peak",
        "key-value cache, for each token",
        "memory that adapter a adds",
        "size on disk",
        "adapter a on disk",
        "adapter b on disk",
        "answer of the base against its golden",
        "answer of a against its golden",
        "answer of b against its golden",
    ]
    assert not any(row["figure"].startswith("prefill") for row in rows(of_classifier))
    assert of_classifier.memory.kv_cache_bytes_per_token is None
    nothing = dataclasses.replace(of_decoder.memory, peak_resident_bytes=None)
    fewer = [row["figure"] for row in rows(dataclasses.replace(of_decoder, memory=nothing))]
    assert set(figures) - set(fewer) == {"memory at peak"}


def test_values_have_units_that_people_read(of_decoder):
    values = dataclasses.replace(
        of_decoder,
        load_time_s=1.234,
        first_run_s=0.01234,
        prefills=(Prefill(8, 0.00001234, 1234.5),),
        adapter_tax=dataclasses.replace(of_decoder.adapter_tax, ratio=1.125),
        sizes=dataclasses.replace(of_decoder.sizes, total_bytes=12_345_678, by_adapter_bytes={"a": 1234}),
        memory=dataclasses.replace(of_decoder.memory, further_adapters_resident_bytes={"a": -8192}),
    )
    shown = {row["figure"]: row["value"] for row in rows(values)}
    assert shown["load"] == "1.23 s"
    assert shown["first run"] == "12.3 ms"
    assert shown["time to first token (8 prompt tokens)"] == "12.3 µs"
    assert shown["prefill (8 prompt tokens)"] == "1234 tokens/s"
    assert shown["time with adapter b against none"] == "+12.5%"
    assert shown["size on disk"] == "12.3 MB"
    assert shown["adapter a on disk"] == "1.2 kB"
    assert shown["memory that adapter a adds"] == "-8.2 kB"


def test_cuda_without_a_gpu_is_a_precise_error(decoder, monkeypatch):
    monkeypatch.setattr(ort, "gpu_is_visible", lambda: False)
    with pytest.raises(ProfileError) as caught:
        profile(decoder, device="cuda", **SMALL)
    assert str(caught.value) == (
        "provider 'cuda' needs an NVIDIA GPU, and none can be seen (no /dev/nvidia*, no nvidia-smi)\n"
        "Hint: choose 'cpu', or a machine with a GPU and its driver"
    )


def test_cuda_without_its_runtime_is_a_precise_error(decoder, monkeypatch):
    monkeypatch.setattr(ort, "gpu_is_visible", lambda: True)
    monkeypatch.setattr(ort, "available_providers", lambda: ("cpu",))
    with pytest.raises(ProfileError) as caught:
        profile(decoder, device="cuda", **SMALL)
    assert str(caught.value) == (
        f"ONNX Runtime {ort.version()} was built without CUDA\n"
        "Hint: pip uninstall onnxruntime && pip install onnxruntime-gpu"
    )


@pytest.mark.parametrize(
    ("visible", "built", "message"),
    [
        (
            False,
            ("cpu",),
            (
                "provider 'tensorrt' needs an NVIDIA GPU, and none can be seen (no /dev/nvidia*, no nvidia-smi)\n"
                "Hint: choose 'cpu', or a machine with a GPU and its driver"
            ),
        ),
        (
            True,
            ("cpu",),
            (
                f"ONNX Runtime {ort.version()} was built without CUDA\n"
                "Hint: pip uninstall onnxruntime && pip install onnxruntime-gpu"
            ),
        ),
        (
            True,
            ("cpu", "cuda"),
            (
                f"ONNX Runtime {ort.version()} was built without TensorRT\nHint: install a build that has it "
                "(https://onnxruntime.ai/docs/execution-providers), or choose 'cuda'"
            ),
        ),
    ],
)
def test_tensorrt_that_cannot_run_is_a_precise_error(visible, built, message, decoder, monkeypatch):
    monkeypatch.setattr(ort, "gpu_is_visible", lambda: visible)
    monkeypatch.setattr(ort, "available_providers", lambda: built)
    with pytest.raises(ProfileError) as caught:
        profile(decoder, device="tensorrt", **SMALL)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("name", "provider"), [("cuda", "CUDAExecutionProvider"), ("tensorrt", "TensorrtExecutionProvider")]
)
def test_a_device_whose_runtime_lacks_the_gpu_says_so(name, provider, decoder):
    """Nothing is known of another Python until it runs."""
    if provider in onnxruntime.get_available_providers():
        pytest.skip(f"this ONNX Runtime has {provider}")
    device = Device("board", "a board", name, runtime="onnxruntime", interpreter=sys.executable)
    with pytest.raises(ProfileError) as caught:
        profile(decoder, device=device, **SMALL)
    assert str(caught.value) == (
        f"ONNX Runtime {ort.version()} was built without {provider}\n"
        "Hint: pip uninstall onnxruntime && pip install onnxruntime-gpu"
    )


def test_another_machine_is_refused(decoder):
    with pytest.raises(ProfileError, match="device 'pi' is an pdp11 machine, and this one is "):
        profile(decoder, device=Device("pi", "a Pi", "cpu", machine="pdp11"), **SMALL)


@pytest.mark.parametrize("name", ["prompt_tokens", "new_tokens", "repeats", "batch_size", "threads"])
@pytest.mark.parametrize("value", [0, 1.5, True])
def test_counts_are_checked(decoder, name, value):
    with pytest.raises(ProfileError) as caught:
        profile(decoder, **(SMALL | {name: value}))
    assert str(caught.value) == f"{name} is {value!r}\nHint: give a whole number of 1 or more"


def test_an_unknown_adapter_or_runtime_is_refused(decoder):
    with pytest.raises(BundleError) as caught:
        profile(decoder, adapter="c", **SMALL)
    assert str(caught.value) == f"{decoder} has no adapter 'c'\nHint: adapters of this bundle: a, b"
    with pytest.raises(ProfileError) as caught:
        profile(decoder, runtime="abacus", **SMALL)
    assert str(caught.value) == "unknown runtime 'abacus'\nHint: known: " + ", ".join(registry.names(RUNTIMES))


def test_what_fails_in_the_child_is_told(decoder):
    with pytest.raises(ProfileError) as caught:
        profile(decoder, **(SMALL | {"prompt_tokens": 60}))
    assert str(caught.value) == (
        "60 tokens and 5 new ones do not fit: this model holds 64 tokens\n"
        "Hint: choose a shorter prompt or fewer new tokens"
    )


def test_a_child_that_dies_is_an_error(decoder, monkeypatch, tmp_path):
    dying = tmp_path / "python"
    dying.write_text('#!/bin/sh\necho "last words" >&2\nkill -9 $$\n')
    dying.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(dying))
    with pytest.raises(ProfileError) as caught:
        profile(decoder, **SMALL)
    assert str(caught.value) == (
        "the process that measured speed was killed by signal 9: last words\n"
        "Hint: if it was killed, the machine may have too little memory; else please report this"
    )


def test_a_child_that_hangs_is_an_error(decoder, monkeypatch, tmp_path):
    hanging = tmp_path / "python"
    hanging.write_text("#!/bin/sh\nexec sleep 60\n")
    hanging.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(hanging))
    with pytest.raises(ProfileError) as caught:
        profile(decoder, timeout_s=0.2, **SMALL)
    assert str(caught.value) == (
        "runner.py took longer than 0.2 s on cpu (this machine) and was stopped there\n"
        "Hint: allow more time, or fewer repeats or tokens"
    )


def test_onnxruntime_alone_gives_the_sessions_answers(decoder, classifier):
    for bundle, adapters in ((decoder, ["a", "b"]), (classifier, ["a"])):
        found = profile(bundle, runtime="onnxruntime", operators=True, **SMALL)
        assert [check.adapter for check in found.checks if check.output == "logits"] == [None, *adapters]
        assert all(check.relative_error < 1e-5 for check in found.checks)
        assert found.swap.from_disk_s is None
        assert found.failures == ()
        assert found.sizes.model_bytes is None
        assert any(row.adapter for row in found.operators)
        assert not all(row.adapter for row in found.operators)


def test_several_lengths_of_prompts(decoder):
    found = profile(decoder, **(SMALL | {"prompt_tokens": [8, 16, 4]}))
    assert [each.prompt_tokens for each in found.prefills] == [8, 16, 4]
    assert found.ttft_s == found.prefills[0].ttft_s
    assert len(found.samples["latency_s"]) == 10
    with pytest.raises(ProfileError, match=r"prompt_tokens is \[8, 8\]"):
        profile(decoder, **(SMALL | {"prompt_tokens": [8, 8]}))


def test_operators_of_a_session_are_timed_by_onnxruntime(decoder):
    found = profile(decoder, operators=True, **SMALL)
    assert found.operators
    assert list(found.operators) == sorted(found.operators, key=lambda row: -row.seconds)


def test_a_sequence_to_sequence_model_needs_the_session(seq2seq):
    with pytest.raises(ProfileError, match="measures bundles of one graph"):
        profile(seq2seq, runtime="onnxruntime", **SMALL)


def test_what_fails_after_the_timing_is_told_and_the_rest_kept(decoder, monkeypatch):
    real = launch.measure

    def measure(transport, place, what, **rest):
        if what == "memory":
            raise ProfileError("the device is lost", hint="plug it in")
        return real(transport, place, what, **rest)

    monkeypatch.setattr(launch, "measure", measure)
    found = profile(decoder, **SMALL)
    assert found.failures == ("memory: the device is lost",)
    assert found.memory is None
    assert found.decode_tokens_per_s > 0


def test_the_quietest_try_is_reported(decoder, monkeypatch):
    real, shares = launch.measure, iter([0.5, 0.3, 0.4])

    def measure(transport, place, what, **rest):
        samples = real(transport, place, what, **rest)
        if what == "speed":
            samples["noise"] |= {"steal_ratio": None, "waiting_ratio": None, "others_ratio": next(shares)}
        return samples

    monkeypatch.setattr(launch, "measure", measure)
    found = profile(decoder, attempts=3, **SMALL)
    assert [attempt.noise.others_ratio for attempt in found.attempts] == [0.5, 0.3, 0.4]
    assert found.noise.others_ratio == 0.3
    assert found.noisy
    assert found.warnings[-1] == "other processes used 30% of the cores' time"
    assert found.latency_p50_s == found.attempts[1].latency_p50_s


def test_a_provider_that_does_not_start_is_an_error_and_no_figure_of_the_cpu(decoder, monkeypatch):
    """ONNX Runtime itself would log a line and run on the CPU."""
    real, loaded = onnxruntime.InferenceSession, []

    def fall_back(*args, **options):
        return real(*args, **(options | {"providers": ["CPUExecutionProvider"]}))

    wanted = ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(engine.ort, "get_available_providers", lambda: wanted)
    monkeypatch.setattr(engine.ort, "preload_dlls", lambda: loaded.append(True), raising=False)
    monkeypatch.setattr(engine.ort, "InferenceSession", fall_back)
    job = {"options": {"provider": "tensorrt", "threads": 1}, "models": {"plain": "graph/decoder.plain.onnx"}}
    opened = engine.Engine(str(decoder), job, {})
    with pytest.raises(engine.NotStartedError) as caught:
        opened.open()
    assert loaded
    assert caught.value.message == (
        "ONNX Runtime could not start TensorrtExecutionProvider and would have used CPUExecutionProvider"
    )
    assert caught.value.hint.startswith("pip install tensorrt")
