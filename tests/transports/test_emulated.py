"""ONNX Runtime on an emulated Arm processor gives this machine's answers."""

from __future__ import annotations

import json
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import helper, numpy_helper

from edgeadapt.profiling import transports

PROGRAM = """
import json, platform
import numpy, onnxruntime
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
session = onnxruntime.InferenceSession("model.onnx", options, providers=["CPUExecutionProvider"])
floats, bytes_ = session.run(None, {"x": numpy.load("x.npy"), "q": numpy.load("q.npy")})
print(json.dumps({"machine": platform.machine(), "version": onnxruntime.__version__,
                  "floats": floats.tolist(), "bytes": bytes_.tolist()}))
"""


def _model(path: Path) -> None:
    """y float32[2, 32] = x float32[2, 64] W, and z int32[2, 32] = q uint8[2, 64] V: the int8 product of dotprod."""
    rng = np.random.default_rng(1)
    tensors = [
        numpy_helper.from_array(rng.normal(size=(64, 32)).astype(np.float32), "W"),
        numpy_helper.from_array(rng.integers(-128, 128, (64, 32)).astype(np.int8), "V"),
    ]
    nodes = [helper.make_node("MatMul", ["x", "W"], ["y"]), helper.make_node("MatMulInteger", ["q", "V"], ["z"])]
    kinds = {"x": (onnx.TensorProto.FLOAT, 64), "q": (onnx.TensorProto.UINT8, 64)}
    results = {"y": (onnx.TensorProto.FLOAT, 32), "z": (onnx.TensorProto.INT32, 32)}
    inputs, outputs = (
        [helper.make_tensor_value_info(name, kind, [2, width]) for name, (kind, width) in group.items()]
        for group in (kinds, results)
    )
    graph = helper.make_graph(nodes, "products", inputs, outputs, tensors)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)


def test_onnxruntime_computes_the_same_on_arm(emulated, tmp_path):
    rng = np.random.default_rng(2)
    given = {"x": rng.normal(size=(2, 64)).astype(np.float32), "q": rng.integers(0, 256, (2, 64)).astype(np.uint8)}
    for name, value in given.items():
        np.save(tmp_path / f"{name}.npy", value)
    _model(tmp_path / "model.onnx")
    (tmp_path / "program.py").write_text(PROGRAM)
    files = {name: tmp_path / name for name in ("x.npy", "q.npy", "model.onnx", "program.py")}
    with transports.connect(replace(emulated.device, machine="aarch64")) as transport:
        assert transport.emulated
        done = transport.run([transport.interpreter, "program.py"], cwd=transport.send(files), timeout_s=300)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    floats, integers = session.run(None, given)
    assert (told["machine"], told["version"]) == ("aarch64", onnxruntime.__version__)
    assert np.array_equal(told["bytes"], integers)
    # sums of 64 products of float32, in another order
    assert np.allclose(told["floats"], floats, rtol=0, atol=1e-4)
    assert emulated.left() == []


def test_the_sysroots_script(root, sysroot, tmp_path):
    """It leaves alone what it did not make, and does nothing when all is there."""
    script = root / "scripts" / "arm64-sysroot"

    def call(*arguments: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run([script, *arguments], capture_output=True, text=True, check=False)

    refused = call(tmp_path)
    assert (refused.returncode, refused.stdout) == (1, "")
    assert refused.stderr == (
        f"error: {tmp_path} is not replaced: this script did not make it\n"
        "hint: choose another folder, or remove it yourself\n"
    )
    assert call("a", "b").stderr == "error: too many arguments: a b\nhint: scripts/arm64-sysroot [FOLDER]\n"
    before = (sysroot / "edgeadapt-sysroot").stat().st_mtime_ns
    assert call(sysroot).returncode == 0
    assert (sysroot / "edgeadapt-sysroot").stat().st_mtime_ns == before


def test_the_versions_are_this_environments(sysroot):
    """What differs between here and there is the processor alone."""
    stamp = (sysroot / "edgeadapt-sysroot").read_text().split()
    assert stamp[:2] == [f"onnxruntime=={onnxruntime.__version__}", f"numpy=={np.__version__}"]
