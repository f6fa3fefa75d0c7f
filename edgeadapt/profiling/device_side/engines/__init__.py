"""Runtimes as the runner drives them, one file each, sent to the device beside `runner.py`.

An engine's file has `version()` and a class `Engine`, made as `Engine(folder, job, tensors)`. An ImportError of the
file means that the runtime is missing on the device. Its methods, in the order in which they are called:

- `open()` opens what the bare base needs; `use(adapter)` makes an adapter (None: the base) active, ready to run;
- `run(inputs)` runs a single pass: arrays by name in, arrays by name out;
- `start(ids, capacity)` begins a text of at most `capacity` tokens: int64[batch, seq] -> float32[batch, vocab], the
  logits of the last position; `step(ids)` goes on: int64[batch, 1] -> float32[batch, vocab];
- `close()` frees everything.

What not every runtime can do may be left out, and its figures are null: `evict(adapter)` forgets what is resident of an
adapter; `idle()` runs as `use(None)` does, but with everything that adapters need in place; `blend(weights)` makes a
weighted mixture active; `operators(once, steps)` calls `once` so often, and returns rows of `name`, `op_type`,
`seconds` (median of one call) and `adapter` (whether the operator is there for adapters alone); `gpu_times()` returns
the seconds of each `run`, `start` and `step` since it was last asked, on the GPU's own clock; `gpu_allocator_bytes()`
what the runtime itself has reserved of the GPU's memory.
"""
