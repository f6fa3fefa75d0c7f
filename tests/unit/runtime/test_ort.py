from __future__ import annotations

import gc
import subprocess
import sys

import numpy as np
import onnxruntime
import pytest
import tiny_graphs as tiny

from edgeadapt.errors import SessionError
from edgeadapt.runtime import open_session, ort
from edgeadapt.runtime.ort import Binding, Tensor, open_graph


def test_tensors_keep_their_memory_alive(decoder):
    """OrtValues borrow numpy's memory: without a reference the values below would be overwritten."""
    path, shape, weights, adapters = decoder
    graph = open_graph(path / "graph" / "decoder.slots.onnx", threads=1)
    binding = Binding(graph, {name: Tensor(value.copy()) for name, value in adapters["a"].items()})
    past = np.zeros((1, shape.kv_heads, 8, shape.head_dim), np.float32)
    for layer in range(shape.layers):
        for part in ("key", "value"):
            buffer = Tensor(past.copy())
            binding.set_input(f"past_key_values.{layer}.{part}", buffer)
            binding.set_output(f"present.{layer}.{part}", buffer)
    del buffer
    binding.set_input("input_ids", Tensor(np.asarray([[5, 6, 7]])))
    binding.set_input("attention_mask", Tensor(np.ones((1, 3), np.int64)))
    binding.allocate_output("logits")
    gc.collect()
    litter = [np.full(1000, np.nan, np.float32) for _ in range(500)]
    found = binding.run()["logits"][0]
    expected = tiny.decoder_reference(shape, weights, np.asarray([5, 6, 7]), adapters["a"])
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5)
    assert len(litter) == 500


def test_a_row_is_a_place_in_its_tensor(decoder):
    tensor = Tensor(np.arange(24, dtype=np.float32).reshape(3, 2, 4))
    row = tensor.row(1)
    assert row.shape == (1, 2, 4)
    assert row._address - tensor.address() == 8 * 4
    for index in (-1, 3):
        with pytest.raises(IndexError):
            tensor.row(index)


def test_scalars_stay_scalars():
    assert Tensor(np.asarray(3, np.int64)).shape == ()


def test_iobinding_ignores_active_adapters(decoder, tmp_path, capfd):
    """Why adapters are bound as inputs: ONNX Runtime's own adapter API does nothing with IO binding."""
    path, shape, _, _ = decoder
    graph = open_graph(path / "graph" / "decoder.slots.onnx", threads=1)

    def run(options):
        io = graph.new_io_binding()
        for name, value in {"input_ids": [[5, 6]], "attention_mask": [[1, 1]]}.items():
            Tensor(np.asarray(value)).bind_input(io, name)
        keep = Tensor(np.zeros((1, shape.kv_heads, 8, shape.head_dim), np.float32))
        for layer in range(shape.layers):
            for part in ("key", "value"):
                keep.bind_input(io, f"past_key_values.{layer}.{part}")
        io.bind_output("logits", "cpu")
        graph._session.run_with_iobinding(io, options)
        return io.get_outputs()[0].numpy()

    adapter = onnxruntime.LoraAdapter()
    adapter.Load(str(path / "adapters" / "a" / "adapter.onnx_adapter"))
    options = onnxruntime.RunOptions()
    plain = run(options)
    options.add_active_adapter(adapter)
    assert run(options).tobytes() == plain.tobytes()
    capfd.readouterr()


def test_slots_are_optional_inputs(decoder):
    graph = open_graph(decoder[0] / "graph" / "decoder.slots.onnx", threads=1)
    assert "layers.0.q_proj.lora_A" in graph.optional
    assert str(graph.optional["layers.0.q_proj.lora_A"]) == "float32[]"
    assert set(graph.inputs) == {
        "input_ids",
        "attention_mask",
        *(f"past_key_values.{i}.{k}" for i in range(2) for k in ("key", "value")),
    }


def test_the_session_prints_nothing(decoder, capfd):
    with open_session(decoder[0], threads=1) as session:
        session.use("a")
        session.run({"input_ids": [[1, 2]]})
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("threads", [0, -1, 1.5, True, "2"])
def test_threads_are_checked(decoder, threads):
    with open_session(decoder[0], threads=threads) as session, pytest.raises(SessionError) as caught:
        session.prepare()
    assert (
        str(caught.value) == f"threads is {threads!r}\nHint: give a whole number of 1 or more, or None for the default"
    )


def test_an_unknown_provider_is_refused(decoder):
    with pytest.raises(SessionError) as caught:
        open_session(decoder[0], provider="tpu")
    assert str(caught.value) == "unknown provider 'tpu'\nHint: known: cpu, cuda"


def test_a_damaged_graph_is_refused(tmp_path, capfd):
    path = tmp_path / "broken.onnx"
    path.write_bytes(b"not a graph")
    with pytest.raises(SessionError) as caught:
        open_graph(path)
    capfd.readouterr()
    assert caught.value.message.startswith(f"{path} could not be opened: ")
    assert caught.value.hint == "check the bundle with `edgeadapt verify`"
    with pytest.raises(SessionError) as caught:
        open_graph(tmp_path / "none.onnx")
    assert str(caught.value) == (
        f"the graph {tmp_path / 'none.onnx'} does not exist\nHint: check the bundle with `edgeadapt verify`"
    )


def test_cuda_without_a_gpu(decoder, monkeypatch):
    monkeypatch.setattr(ort, "gpu_is_visible", lambda: False)
    with pytest.raises(SessionError) as caught:
        open_session(decoder[0], provider="cuda")
    assert str(caught.value) == (
        "provider 'cuda' needs an NVIDIA GPU, and none can be seen (no /dev/nvidia*, no nvidia-smi)\n"
        "Hint: choose 'cpu', or a machine with a GPU and its driver"
    )


def test_cuda_without_onnxruntime_gpu(decoder, monkeypatch):
    monkeypatch.setattr(ort, "gpu_is_visible", lambda: True)
    monkeypatch.setattr(ort, "available_providers", lambda: ("cpu",))
    with pytest.raises(SessionError) as caught:
        open_session(decoder[0], provider="cuda")
    assert str(caught.value) == (
        f"ONNX Runtime {onnxruntime.__version__} was built without CUDA\n"
        "Hint: pip uninstall onnxruntime && pip install onnxruntime-gpu"
    )


def test_cuda_that_falls_back_to_the_cpu_is_an_error(decoder, monkeypatch):
    """ONNX Runtime itself would log a line and run on the CPU."""
    monkeypatch.setattr(ort, "gpu_is_visible", lambda: True)
    monkeypatch.setattr(ort, "available_providers", lambda: ("cpu", "cuda"))
    monkeypatch.setattr(ort, "_preload_cuda", lambda: None)
    real = onnxruntime.InferenceSession

    def fall_back(*args, **options):
        return real(*args, **(options | {"providers": ["CPUExecutionProvider"]}))

    monkeypatch.setattr(onnxruntime, "InferenceSession", fall_back)
    with open_session(decoder[0], provider="cuda") as session, pytest.raises(SessionError) as caught:
        session.prepare()
    assert str(caught.value) == (
        "ONNX Runtime could not start CUDA and would have used the CPU: "
        "CUDA or cuDNN libraries are missing or too old\n"
        'Hint: pip install "onnxruntime-gpu[cuda,cudnn]", or put the CUDA libraries on LD_LIBRARY_PATH'
    )


def test_a_gpu_is_seen_by_its_device_file(tmp_path, monkeypatch):
    monkeypatch.setattr(ort.shutil, "which", lambda _: None)
    assert not ort.gpu_is_visible(tmp_path)
    (tmp_path / "nvidiactl").touch()
    assert not ort.gpu_is_visible(tmp_path)
    (tmp_path / "nvidia0").touch()
    assert ort.gpu_is_visible(tmp_path)


def test_the_runtime_needs_neither_torch_nor_onnx():
    code = (
        "import sys, edgeadapt.runtime; "
        "print([m for m in ('torch', 'transformers', 'peft', 'onnx', 'onnx_ir', 'PIL', 'jinja2') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
