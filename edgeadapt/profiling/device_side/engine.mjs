// A bundle in ONNX Runtime's JavaScript API (node or web): opens graphs, swaps adapters, runs, keeps a decoder's cache.
//
// In node a tensor is the memory of its typed array, so past and present of the cache can be one buffer that
// GroupQueryAttention updates in place. On the web each run copies its inputs into WebAssembly's memory and its outputs
// out again: there `present` is fed back as `past`, as web applications do, and on WebGPU it stays in the GPU's memory.

import { MeasureError } from "./tensors.mjs";

const CACHE_ARRAYS = { float32: Float32Array, int8: Int8Array };

export class Engine {
  // ort: the module; open(file, presents): returns a session; inPlace: whether tensors are memory that sessions write to
  // reread(keys): a Map of tensors read from the disk again, null where there is none
  // defaults: a Map of what is fed to inputs that an adapter does not set, because this API knows no optional inputs
  // takesEmpty: whether tensors of no elements can be fed
  constructor({ ort, open, inPlace, takesEmpty, reread, job, tensors, defaults }) {
    this.ort = ort;
    this.job = job;
    this.inPlace = inPlace && job.decoder !== null && job.decoder.shared;
    this.openSession = open;
    this.reread = reread;
    this.tensors = tensors;
    this.defaults = takesEmpty ? defaults : new Map([...defaults].map(([name, value]) => [name, notEmpty(value)]));
    this.sessions = new Map();
    this.fed = new Map(); // by graph
    this.resident = new Map();
    this.graph = "plain";
    this.active = {};
    this.answers = job.answers;
    this.cache = null;
  }

  async open() {
    await this.session("plain");
  }

  async session(kind) {
    if (!this.sessions.has(kind)) {
      const file = this.job.models[kind];
      if (file === undefined) throw new MeasureError(`the job has no ${kind} graph`, "export the bundle again, without --merge");
      const presents = this.job.decoder === null ? [] : this.job.decoder.cache.map((pair) => pair.present);
      const session = await this.openSession(file, presents);
      this.sessions.set(kind, session);
      const known = [...this.defaults].filter(([name]) => session.inputNames.includes(name));
      this.fed.set(kind, Object.fromEntries(known.map(([name, value]) => [name, this.wrap(value)])));
    }
    return this.sessions.get(kind);
  }

  async use(adapter) {
    if (adapter !== null && !this.resident.has(adapter)) this.resident.set(adapter, await this.adapterTensors(adapter));
    this.graph = adapter === null ? "plain" : "slots";
    this.active = adapter === null ? {} : this.resident.get(adapter);
    const { inputNames } = await this.session(this.graph);
    const unknown = Object.keys(this.active).find((name) => !inputNames.includes(name));
    if (unknown !== undefined) throw new MeasureError(`no graph takes the input ${unknown} of adapter ${adapter}`, "check the bundle with `edgeadapt verify`");
  }

  // Runs the base in the graph that takes adapters, with none fed.
  async idle() {
    await this.use(null);
    if (this.job.models.slots === undefined) return;
    this.graph = "slots";
    await this.session("slots");
  }

  get current() {
    return this.sessions.get(this.graph);
  }

  async adapterTensors(adapter) {
    const inputs = this.job.adapters[adapter];
    if (inputs === undefined) throw new MeasureError(`the job has no adapter ${adapter}`, `it has ${Object.keys(this.job.adapters).join(", ") || "none"}`);
    const gone = Object.values(inputs).filter((key) => !this.tensors.has(key));
    if (gone.length > 0 && this.reread !== null) for (const [key, value] of await this.reread(gone)) this.tensors.set(key, value);
    return Object.fromEntries(Object.entries(inputs).map(([name, key]) => [name, this.tensor(key)]));
  }

  // Returns a tensor of the job's file as ONNX Runtime takes it.
  tensor(key) {
    const found = this.tensors.get(key);
    if (found === undefined) throw new MeasureError(`tensors.safetensors has no tensor ${key}`, "run `edgeadapt profile` again");
    return this.wrap(found);
  }

  wrap({ type, data, dims }) {
    return new this.ort.Tensor(type, data, dims);
  }

  // Forgets an adapter's tensors; the next use reads them from the disk again.
  evict(adapter) {
    this.resident.delete(adapter);
    for (const key of Object.values(this.job.adapters[adapter])) this.tensors.delete(key);
  }

  // Runs a single pass; inputs and outputs are tensors by name.
  async run(inputs) {
    return this.current.run({ ...this.fed.get(this.graph), ...inputs, ...this.active }, this.answers);
  }

  // Reads ids BigInt64Array[batch * seq] into a new cache for `capacity` tokens; returns float32[batch * vocab].
  async start(ids, batch, capacity) {
    this.dropCache();
    this.cache = { batch, length: 0, tensors: this.newCache(batch, capacity) };
    return this.advance(ids);
  }

  // Reads ids BigInt64Array[batch * seq] after what the cache holds; returns the last position's logits.
  async step(ids) {
    return this.advance(ids);
  }

  newCache(batch, capacity) {
    const { cache, heads, head_dim: dim, dtype } = this.job.decoder;
    const Values = CACHE_ARRAYS[dtype];
    if (Values === undefined) throw new MeasureError(`a cache of ${dtype} is not known here`, `known are ${Object.keys(CACHE_ARRAYS).join(", ")}`);
    const length = this.inPlace ? capacity : 0;
    const fresh = () => new this.ort.Tensor(dtype, new Values(batch * heads * length * dim), [batch, heads, length, dim]);
    return cache.map(fresh);
  }

  async advance(ids) {
    const { cache: names, logits_from: trims } = this.job.decoder;
    const { batch, tensors } = this.cache;
    const width = ids.length / batch;
    const total = this.cache.length + width;
    const feeds = { ...this.fed.get(this.graph), ...this.active };
    feeds.input_ids = this.int64(ids, [batch, width]);
    feeds.attention_mask = this.int64(new BigInt64Array(batch * total).fill(1n), [batch, total]);
    if (trims) feeds.logits_from = this.int64(BigInt64Array.of(BigInt(width - 1)), [1]);
    const fetches = { logits: null };
    names.forEach(({ past, present }, index) => {
      feeds[past] = tensors[index];
      fetches[present] = this.inPlace ? tensors[index] : null;
    });
    const found = await this.current.run(feeds, fetches);
    if (!this.inPlace) this.keepPresent(found);
    this.cache.length = total;
    return lastPosition(found.logits, batch);
  }

  keepPresent(found) {
    const before = this.cache.tensors;
    this.cache.tensors = this.job.decoder.cache.map(({ present }) => found[present]);
    for (const tensor of before) tensor.dispose(); // frees the GPU's memory; nothing to free elsewhere
  }

  dropCache() {
    if (this.cache !== null) for (const tensor of this.cache.tensors) tensor.dispose();
    this.cache = null;
  }

  int64(values, dims) {
    return new this.ort.Tensor("int64", values, dims);
  }

  async close() {
    this.dropCache();
    for (const session of this.sessions.values()) await session.release();
    this.sessions.clear();
  }
}

// Returns zeros of length 1 where an axis has length 0: a rank of 1 whose product is 0.
function notEmpty(tensor) {
  if (tensor.data.length > 0) return tensor;
  const dims = tensor.dims.map((axis) => Math.max(1, axis));
  return { ...tensor, dims, data: new tensor.data.constructor(dims.reduce((product, axis) => product * axis, 1)) };
}

// float32[batch, positions, vocab] -> float32[batch * vocab] of the last position
function lastPosition(logits, batch) {
  const [, positions, vocab] = logits.dims;
  if (positions === 1) return logits.data;
  const found = new Float32Array(batch * vocab);
  for (let row = 0; row < batch; row += 1) {
    const end = (row + 1) * positions * vocab;
    found.set(logits.data.subarray(end - vocab, end), row * vocab);
  }
  return found;
}

// float32[batch * vocab] -> BigInt64Array[batch], the largest of each row
export function argmax(logits, batch) {
  const vocab = logits.length / batch;
  const found = new BigInt64Array(batch);
  for (let row = 0; row < batch; row += 1) {
    let best = row * vocab;
    for (let index = best + 1; index < (row + 1) * vocab; index += 1) if (logits[index] > logits[best]) best = index;
    found[row] = BigInt(best - row * vocab);
  }
  return found;
}
