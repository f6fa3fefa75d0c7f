// The worker of the page that measures: everything heavy happens here, so that the page can go on telling what happens.
//
// It is told {base, kind, agent}: the address below which the job and the runtime lie, what to measure, and what the
// browser calls itself. It tells {progress, partial} again and again, and at last {result} or {error, partial}.

import { SCHEMA, measure } from "./measure.mjs";
import { MeasureError } from "./tensors.mjs";

const OPTIONS = ["provider", "threads", "defaults", "external_data", "extra"];
const MODULES = { wasm: "ort.wasm.min.mjs", webgpu: "ort.webgpu.min.mjs" };
const NO_SYSTEM = { energy_j: null, clock_hz_min: null, clock_hz_max: null, temperature_c_start: null, temperature_c_end: null };

// y = x, float32[1]: opening it starts the runtime, so that neither load times nor the memory of models include that
const SMALLEST_MODEL = "CAg6NwoQCgF4EgF5IghJZGVudGl0eRIBZ1oPCgF4EgoKCAgBEgQKAggBYg8KAXkSCgoICAESBAoCCAFCBAoAEA0=";

const seconds = () => performance.now() / 1000;

async function main({ base, kind, agent }, found) {
  const job = await (await fetchFile(base, "job/job.json")).json();
  const { options } = job;
  const unknown = Object.keys(options).find((name) => !OPTIONS.includes(name));
  if (unknown !== undefined) throw new MeasureError(`unknown option ${unknown} of the engine onnxruntime_web`, `known are ${OPTIONS.join(", ")}`);
  const file = MODULES[options.provider];
  if (file === undefined) throw new MeasureError(`unknown provider ${options.provider}`, `known are ${Object.keys(MODULES).join(", ")}`);
  const notes = [...(job.notes ?? [])];
  const threads = threadsFor(options, notes);
  const gpu = options.provider === "webgpu" ? await graphicsAdapter(notes) : null;
  const ort = await import(`${base}ort/${file}`);
  ort.env.wasm.wasmPaths = `${base}ort/`;
  ort.env.wasm.numThreads = threads;
  ort.env.logLevel = "error"; // a warning per adapter slot would drown everything else
  const version = ort.env.versions.web;
  const start = seconds();
  await (await ort.InferenceSession.create(Uint8Array.from(atob(SMALLEST_MODEL), (letter) => letter.charCodeAt(0)))).release();
  if (kind === "speed") notes.push(`fetching, compiling and starting ONNX Runtime took ${(seconds() - start).toFixed(2)} s, which the load time does not include`);
  Object.assign(found, { schema: SCHEMA, measure: kind, engine: job.engine, engine_version: version, machine: null, notes, process_start_s: null });
  found.threads = threads;
  found.host = {
    cpu: null,
    cores: navigator.hardwareConcurrency,
    machine: null,
    system: agent.system,
    memory_bytes: null,
    gpu,
    versions: { browser: agent.browser, [job.engine]: version },
  };
  await measure(await platform({ base, job, ort, found }), job, kind, found);
  const resolution = clockResolution();
  if (resolution > 1e-5) notes.push(`the browser's clock is read to ${(resolution * 1e3).toPrecision(2)} ms: shorter times are 0 or a multiple of it`);
}

// Returns how many threads WebAssembly gets; null stands for ONNX Runtime's own choice.
function threadsFor({ threads }, notes) {
  const wanted = threads ?? Math.min(4, Math.ceil((navigator.hardwareConcurrency || 1) / 2));
  if (wanted > 1 && !self.crossOriginIsolated) {
    notes.push(`1 thread instead of ${wanted}: browsers give a page that comes over plain http from another machine no more`);
    return 1;
  }
  if (threads === null) notes.push(`${wanted} of ${navigator.hardwareConcurrency} cores: ONNX Runtime's own choice`);
  return wanted;
}

async function graphicsAdapter(notes) {
  const adapter = await navigator.gpu?.requestAdapter();
  if (!adapter) throw new MeasureError("this browser offers no WebGPU adapter", "use a device with provider wasm, or a browser with WebGPU (over plain http only on localhost)");
  const { vendor, architecture, description, isFallbackAdapter } = adapter.info;
  const name = [vendor, architecture, description].filter(Boolean).join(" ") || "unnamed adapter";
  if (isFallbackAdapter || architecture === "swiftshader") notes.push(`software adapter (${name}): its answers can be checked, its latency means nothing`);
  return name;
}

async function platform({ base, job, ort, found }) {
  const { provider, extra, external_data: external = [] } = job.options;
  const fetched = found.measure === "speed" ? await fetchAhead(base, job, external, found.notes) : new Map();
  const bytesOf = async (file) => fetched.get(file) ?? plainBytes(base, file);
  const openSession = async (file, presents) => {
    const settings = { executionProviders: [provider], graphOptimizationLevel: "all", logSeverityLevel: 3 };
    if (external.length > 0) {
      settings.externalData = await Promise.all(external.map(async (path) => ({ path: path.split("/").at(-1), data: await bytesOf(path) })));
    }
    if (extra !== undefined) settings.extra = extra;
    if (provider === "webgpu") settings.preferredOutputLocation = Object.fromEntries(presents.map((name) => [name, "gpu-buffer"]));
    return ort.InferenceSession.create(await bytesOf(file), settings);
  };
  if (provider === "webgpu") found.notes.push("an adapter that sets nothing at a module is fed as zeros of rank 1 there: WebGPU takes no empty arrays");
  const told = { at: 0 };
  return {
    ort,
    openSession,
    loaded: () => fetched.clear(),
    takesEmpty: provider !== "webgpu",
    inPlace: false, // each run copies inputs into WebAssembly's memory, and outputs out of it
    reread: null,
    readFile: (name) => plainBytes(base, name),
    now: seconds,
    memory: async () => (await fetchFile(base, "memory")).json(),
    noise: () => ({ read: () => null }),
    system: () => ({ read: () => NO_SYSTEM }),
    progress(stage, done, total) {
      if (done > 0 && seconds() - told.at < 0.2) return; // telling costs time too
      told.at = seconds();
      self.postMessage({ progress: { stage, done, total }, partial: found });
    },
  };
}

// Fetches what loading opens, so that a load is timed without the network; says how long that took.
async function fetchAhead(base, job, external, notes) {
  const kinds = job.active === null ? ["plain"] : ["plain", "slots"];
  const files = [...kinds.map((kind) => job.models[kind]), ...external];
  const start = seconds();
  const fetched = new Map();
  for (const [index, file] of files.entries()) {
    self.postMessage({ progress: { stage: "fetch the model", done: index, total: files.length } });
    fetched.set(file, await plainBytes(base, file));
  }
  const size = [...fetched.values()].reduce((sum, bytes) => sum + bytes.length, 0);
  notes.push(`fetching the model's ${(size / 1e6).toFixed(1)} MB took ${(seconds() - start).toFixed(2)} s, which the load time does not include`);
  return fetched;
}

async function plainBytes(base, name) {
  return new Uint8Array(await (await fetchFile(base, `job/${name}`)).arrayBuffer());
}

async function fetchFile(base, name) {
  const answer = await fetch(base + name);
  if (!answer.ok) throw new MeasureError(`${name} cannot be fetched: ${answer.status} ${answer.statusText}`, "keep `edgeadapt profile` running until the page says that it is done");
  return answer;
}

// Returns the smallest step of the clock that shows, in seconds.
function clockResolution() {
  let smallest = Infinity;
  for (let step = 0; step < 20; step += 1) {
    const start = performance.now();
    let now = start;
    while (now === start) now = performance.now();
    smallest = Math.min(smallest, now - start);
  }
  return smallest / 1000;
}

self.onmessage = async ({ data }) => {
  const found = {};
  try {
    await main(data, found);
    self.postMessage({ result: found });
  } catch (error) {
    const message = error instanceof MeasureError ? error.message : `${error.name ?? "Error"}: ${error.message ?? error}`;
    self.postMessage({ error: { message, hint: error.hint ?? "check that this browser can run the model; it may have too little memory" }, partial: found });
  }
};
