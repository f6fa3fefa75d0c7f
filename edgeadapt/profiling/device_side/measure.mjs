// The measuring loops of runner.py in JavaScript, for node and browsers: same order, same names, raw samples in seconds.

import { Engine, argmax } from "./engine.mjs";
import { MeasureError, parseTensors } from "./tensors.mjs";

export const SCHEMA = "edgeadapt.samples/1";
const RUNS_PER_REPEAT = 10; // as in runner.py: percentiles of few runs mean nothing
const TAX_STEPS = 16;
const CHECKED_STEPS = 4;

// What is run again and again: texts that are begun and continued, or one input of a single pass.
class Work {
  constructor(engine, job, now) {
    const plan = job.workload;
    this.engine = engine;
    this.now = now;
    this.writes = job.decoder !== null;
    this.newTokens = plan.new_tokens;
    this.repeats = plan.repeats;
    this.batch = plan.batch_size;
    this.promptTokens = this.writes ? plan.prompt_tokens : [];
    this.inputs = namedTensors(engine, job.inputs);
    const random = randomNumbers(); // speed does not depend on which tokens are read
    const ids = (count) => BigInt64Array.from({ length: this.batch * count }, () => BigInt(Math.floor(random() * job.decoder.vocab_size)));
    this.prompts = new Map(this.promptTokens.map((count) => [count, ids(count)]));
  }

  // Begins a text and returns the next tokens, BigInt64Array[batch].
  async begin(promptTokens) {
    return argmax(await this.engine.start(this.prompts.get(promptTokens), this.batch, promptTokens + this.newTokens), this.batch);
  }

  async goOn(ids) {
    return argmax(await this.engine.step(ids), this.batch);
  }

  // Runs one answer, or one pass.
  async once() {
    if (!this.writes) return this.engine.run(this.inputs);
    let ids = await this.begin(this.promptTokens[0]);
    for (let token = 0; token < this.newTokens; token += 1) ids = await this.goOn(ids);
    return ids;
  }

  // Returns the median time of some steps of a text, or of one pass.
  async blockSeconds() {
    if (!this.writes) return timed(this.now, () => this.engine.run(this.inputs));
    let ids = await this.begin(this.promptTokens[0]);
    const taken = [];
    for (let token = 0; token < Math.min(TAX_STEPS, this.newTokens); token += 1) {
      const start = this.now();
      ids = await this.goOn(ids);
      taken.push(this.now() - start);
    }
    return median(taken);
  }
}

// Adds what `kind` is for to `found`. The platform is what node and browsers differ in:
//   ort, openSession(file, presents), inPlace, takesEmpty: see Engine
//   readFile(name): the bytes of a file of the job's folder;  now(): seconds
//   reread(keys): a Map of tensors read from the disk again, null where there is no disk
//   memory(): this process's memory or null;  noise(), system(): meters that begin now and have read()
//   progress(stage, done, total): is told what happens;  loaded(): is told that the model is open
export async function measure(platform, job, kind, found) {
  const measurement = MEASUREMENTS[kind];
  if (measurement === undefined) throw new MeasureError(`unknown measurement ${kind}`, `known are ${Object.keys(MEASUREMENTS).join(", ")}`);
  const tensors = parseTensors(await platform.readFile("tensors.safetensors"), "tensors.safetensors");
  const { defaults: file } = job.options;
  const defaults = file === undefined ? new Map() : parseTensors(await platform.readFile(file), file);
  const { ort, openSession: open, inPlace, takesEmpty, reread } = platform;
  const engine = new Engine({ ort, open, inPlace, takesEmpty, reread, job, tensors, defaults });
  try {
    await measurement({ engine, job, platform, found });
  } finally {
    await engine.close();
  }
}

async function measureSpeed({ engine, job, platform, found }) {
  const { now, progress } = platform;
  const [noise, system] = [platform.noise(), platform.system()];
  const { active, tax_adapter: other } = job;
  const work = new Work(engine, job, now);
  progress("open the model", 0, 1);
  found.load_time_s = await timed(now, async () => {
    await engine.open();
    await engine.use(active);
  });
  platform.loaded();
  progress("first run", 0, 1);
  found.first_run_s = await timed(now, () => (work.writes ? work.begin(work.promptTokens[0]) : work.once()));
  if (work.writes) await answers(work, found, platform);
  else found.latency_s = await passes(work, platform);
  if (other !== null) {
    found.tax = await restoring(engine, active, () => tax(engine, work, other, platform));
    found.swap = await restoring(engine, active, () => swap(engine, other, job, platform));
  }
  found.noise = noise.read();
  found.system = system.read();
  found.checks = await measureChecks(engine, job, platform);
}

async function passes(work, { now, progress }) {
  const taken = [];
  const total = work.repeats * RUNS_PER_REPEAT;
  for (let run = 0; run < total; run += 1) {
    progress("runs", run, total);
    taken.push(await timed(now, () => work.once()));
  }
  return taken;
}

// Times texts: the first token for each length of prompt, in turn, and the tokens after the first length.
async function answers(work, found, { now, progress }) {
  found.ttft_s = Object.fromEntries(work.promptTokens.map((count) => [String(count), []]));
  found.latency_s = [];
  for (let repeat = 0; repeat < work.repeats; repeat += 1) {
    progress("texts", repeat, work.repeats);
    let ids;
    let clock;
    for (const count of [...work.promptTokens].reverse()) {
      // the first length last: its text goes on
      const start = now();
      ids = await work.begin(count);
      clock = now();
      found.ttft_s[String(count)].push(clock - start);
    }
    for (let token = 0; token < work.newTokens; token += 1) {
      ids = await work.goOn(ids);
      const before = clock;
      clock = now();
      found.latency_s.push(clock - before);
    }
  }
}

// Times blocks of the base, of the adapter, and of the base with all in place for adapters, in turned order.
async function tax(engine, work, adapter, { progress }) {
  const ways = { base_s: () => engine.use(null), active_s: () => engine.use(adapter), idle_s: () => engine.idle() };
  const names = Object.keys(ways);
  const samples = Object.fromEntries(names.map((name) => [name, []]));
  for (const name of names) {
    await ways[name]();
    await work.blockSeconds(); // warm: opens the graph and touches its memory
  }
  const total = work.repeats * 2;
  for (let repeat = 0; repeat < total; repeat += 1) {
    progress(`adapter ${adapter} against none`, repeat, total);
    for (const name of repeat % 2 === 0 ? names : [...names].reverse()) {
      await ways[name]();
      samples[name].push(await work.blockSeconds());
    }
  }
  return { adapter, ...samples };
}

async function swap(engine, adapter, job, { now, progress, reread }) {
  const resident = [];
  const disk = [];
  await engine.use(adapter);
  for (let repeat = 0; repeat < job.workload.swaps; repeat += 1) {
    progress("swaps", repeat, job.workload.swaps);
    await engine.use(null);
    resident.push(await timed(now, () => engine.use(adapter)));
    if (reread !== null) {
      await engine.use(null);
      engine.evict(adapter);
      disk.push(await timed(now, () => engine.use(adapter)));
    }
  }
  return { adapter, resident_s: resident, from_disk_s: reread === null ? null : disk, blend_s: null };
}

async function restoring(engine, active, body) {
  try {
    return await body();
  } finally {
    await engine.use(active);
  }
}

async function measureMemory({ engine, job, platform, found }) {
  const { memory, progress } = platform;
  const stages = { before_load: await memory() };
  progress("open the model", 0, 1);
  await engine.open();
  await engine.use(job.active);
  platform.loaded();
  stages.after_load = await memory();
  const work = new Work(engine, job, platform.now);
  progress("memory of a run", 0, 1);
  await work.once();
  stages.after_run = await memory();
  stages.further_adapters = {};
  for (const name of job.others) {
    progress(`memory of adapter ${name}`, 0, 1);
    await engine.use(name);
    await work.once();
    stages.further_adapters[name] = await memory();
  }
  stages.timeline = [];
  found.memory = Object.values(stages).includes(null) ? null : stages;
}

async function measureOperators({ found }) {
  found.operators = null;
  found.notes.push("this runtime does not tell the time of its operators");
}

async function measureCold({ found }) {
  found.cold_load_time_s = null;
  found.notes.push("a cold load was not measured: a script cannot ask the system to forget files");
}

async function checksAlone({ engine, job, platform, found }) {
  await engine.open();
  platform.loaded();
  found.checks = await measureChecks(engine, job, platform);
}

// Returns how far this runtime's answers are from the goldens'; a text is read at once and token by token.
async function measureChecks(engine, job, { progress }) {
  const rows = [];
  for (const [index, check] of job.checks.entries()) {
    progress("answers against the goldens", index, job.checks.length);
    await engine.use(check.adapter);
    const inputs = namedTensors(engine, check.inputs);
    const expected = namedTensors(engine, check.outputs);
    const pairs = job.decoder === null ? await passPairs(engine, inputs, expected) : { logits: await textPairs(engine, inputs.input_ids, expected.logits) };
    for (const [output, each] of Object.entries(pairs)) rows.push({ adapter: check.adapter, output, ...gap(each) });
  }
  if (job.checks.length > 0) await engine.use(job.active);
  return rows;
}

async function passPairs(engine, inputs, expected) {
  const got = await engine.run(inputs);
  return Object.fromEntries(Object.entries(expected).map(([name, wanted]) => [name, [pair(got[name], wanted)]]));
}

// Returns the last position's logits beside the expected ones: read at once, and the last tokens one by one.
async function textPairs(engine, ids, expected) {
  const [batch, length] = ids.dims;
  const [, positions, vocab] = expected.dims;
  const wanted = { dims: [batch, vocab], data: positionsOf(expected.data, batch, vocab, positions - 1, positions) };
  const beside = (data) => pair({ dims: [batch, data.length / batch], data }, wanted);
  const columns = (first, last) => positionsOf(ids.data, batch, 1, first, last);
  const pairs = [beside(await engine.start(ids.data, batch, length))];
  const split = Math.max(1, length - CHECKED_STEPS);
  if (split >= length) return pairs;
  let got = await engine.start(columns(0, split), batch, length);
  for (let place = split; place < length; place += 1) got = await engine.step(columns(place, place + 1));
  pairs.push(beside(got));
  return pairs;
}

// [rows, positions, width] flat -> positions `first` to `last` of each row, flat
function positionsOf(values, rows, width, first, last) {
  const size = values.length / rows;
  const found = new values.constructor(rows * (last - first) * width);
  for (let row = 0; row < rows; row += 1) {
    const start = row * size;
    found.set(values.subarray(start + first * width, start + last * width), row * (last - first) * width);
  }
  return found;
}

function pair(got, wanted) {
  if (got === undefined || String(got.dims) !== String(wanted.dims)) {
    throw new MeasureError(`the runtime gave [${got?.dims}], the golden has [${wanted.dims}]`, "export the bundle again");
  }
  return { got: Float64Array.from(got.data), wanted: Float64Array.from(wanted.data), dims: wanted.dims };
}

function gap(pairs) {
  let largest = 0;
  let scale = 0;
  let same = null;
  for (const { got, wanted, dims } of pairs) {
    if (!got.every(Number.isFinite)) throw new MeasureError("the runtime gave NaN or infinite values", "this runtime cannot run the model: try another precision");
    got.forEach((value, index) => {
      largest = Math.max(largest, Math.abs(value - wanted[index]));
      scale = Math.max(scale, Math.abs(wanted[index]));
    });
    if (dims.length > 1) same = (same ?? true) && sameTops(got, wanted, dims.at(-1));
  }
  return { max_abs_error: largest, relative_error: largest / (scale || 1), same_top1: same };
}

function sameTops(got, wanted, width) {
  const rows = got.length / width;
  return argmax(got, rows).join() === argmax(wanted, rows).join();
}

function namedTensors(engine, names) {
  return Object.fromEntries(Object.entries(names).map(([name, key]) => [name, engine.tensor(key)]));
}

async function timed(now, call) {
  const start = now();
  await call();
  return now() - start;
}

export function median(values) {
  const sorted = Float64Array.from(values).sort();
  const middle = sorted.length >> 1;
  return sorted.length % 2 === 1 ? sorted[middle] : (sorted[middle - 1] + sorted[middle]) / 2;
}

// mulberry32: a stream of numbers in [0, 1), the same in every run
function randomNumbers() {
  let state = 0x9e3779b9;
  return () => {
    state = (state + 0x6d2b79f5) | 0;
    let mixed = Math.imul(state ^ (state >>> 15), 1 | state);
    mixed = (mixed + Math.imul(mixed ^ (mixed >>> 7), 61 | mixed)) ^ mixed;
    return ((mixed ^ (mixed >>> 14)) >>> 0) / 4294967296;
  };
}

const MEASUREMENTS = { speed: measureSpeed, memory: measureMemory, cold: measureCold, operators: measureOperators, checks: checksAlone };
