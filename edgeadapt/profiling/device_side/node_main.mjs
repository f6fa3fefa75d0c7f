// The program that measures in node: `node node_main.mjs FOLDER MEASURE MODULES [SPAWNED_AT_S]`.
//
// FOLDER is a job's; MODULES a folder in which node_modules with onnxruntime-node lies, "~" for the home folder;
// SPAWNED_AT_S the monotonic clock of the parent when it started this. Prints what runner.py prints, as the only line on
// stdout.

import { open, readFile } from "node:fs/promises";
import { createRequire } from "node:module";
import { availableParallelism, homedir } from "node:os";
import { join, resolve } from "node:path";
import process from "node:process";

import { SCHEMA, measure } from "./measure.mjs";
import { hostFacts, memoryNow, noiseMeter, systemMeter } from "./system_node.mjs";
import { MeasureError, readSomeTensors } from "./tensors.mjs";

const OPTIONS = ["provider", "threads", "defaults"];
const SPIN = { session: { intra_op: { spin_duration_us: "50" } } }; // as in the Python engine

const seconds = () => Number(process.hrtime.bigint()) / 1e9;

async function main(found, folder, kind, modules, spawnedAt) {
  const job = JSON.parse(await readFile(join(folder, "job.json"), "utf-8"));
  const { ort, version } = loadRuntime(modules);
  Object.assign(found, {
    schema: SCHEMA,
    measure: kind,
    engine: job.engine,
    engine_version: version,
    notes: [...(job.notes ?? [])],
    process_start_s: spawnedAt === undefined ? null : seconds() - Number(spawnedAt),
  });
  found.host = hostFacts({ node: process.versions.node, [job.engine]: version });
  found.machine = found.host.machine;
  found.threads = job.options.threads ?? found.host.cores;
  await measure(platform(folder, job.options, ort), job, kind, found);
}

function platform(folder, options, ort) {
  const unknown = Object.keys(options).filter((name) => !OPTIONS.includes(name));
  if (unknown.length > 0) throw new MeasureError(`unknown option ${unknown[0]} of the engine onnxruntime_node`, `known are ${OPTIONS.join(", ")}`);
  const settings = {
    executionProviders: [options.provider],
    intraOpNumThreads: options.threads ?? availableParallelism(),
    interOpNumThreads: 1,
    logSeverityLevel: 3, // a warning per adapter slot would drown everything else
    extra: SPIN,
  };
  return {
    ort,
    takesEmpty: true,
    inPlace: true, // a tensor is the memory of its typed array
    openSession: (file) => ort.InferenceSession.create(join(folder, file), settings),
    readFile: async (name) => plainBytes(await readFile(join(folder, name))),
    reread: (keys) => rereadTensors(join(folder, "tensors.safetensors"), keys),
    now: seconds,
    memory: memoryNow,
    noise: noiseMeter,
    system: systemMeter,
    progress: () => {},
    loaded: () => {},
  };
}

function loadRuntime(modules) {
  const require = createRequire(join(modules === "~" ? homedir() : resolve(modules), "any.js"));
  try {
    return { ort: require("onnxruntime-node"), version: require("onnxruntime-node/package.json").version };
  } catch (error) {
    if (error.code === "MODULE_NOT_FOUND") error.missing = "onnxruntime-node";
    throw error;
  }
}

async function rereadTensors(path, keys) {
  const file = await open(path);
  try {
    const read = async (first, count) => (await file.read(new Uint8Array(count), 0, count, first)).buffer;
    return await readSomeTensors(read, keys, path);
  } finally {
    await file.close();
  }
}

function plainBytes(buffer) {
  return new Uint8Array(buffer.buffer, buffer.byteOffset, buffer.length);
}

function failure(error, found) {
  if (error.missing) return { error: { message: `${error.missing} is not installed`, hint: "", missing: error.missing } };
  const message = error instanceof MeasureError ? error.message : `${error.name}: ${error.message}`;
  return { error: { message, hint: error.hint ?? "check that this version of the runtime can run the model" }, partial: found };
}

console.log = console.error; // what libraries print must not end up in the answer
const found = {};
let reply;
try {
  await main(found, ...process.argv.slice(2));
  reply = { result: found };
} catch (error) {
  reply = failure(error, found);
}
process.stdout.write(`${JSON.stringify(reply)}\n`);
