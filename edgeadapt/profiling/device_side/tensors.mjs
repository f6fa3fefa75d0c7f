// A strict reader of safetensors files (https://github.com/huggingface/safetensors#format), for node and browsers.

const MAX_HEADER_BYTES = 100_000_000; // the format's own limit

// dtype of the file -> [ONNX Runtime's name, what holds the values]
const TYPES = {
  F32: ["float32", Float32Array],
  F16: ["float16", Uint16Array],
  I64: ["int64", BigInt64Array],
  I32: ["int32", Int32Array],
  I8: ["int8", Int8Array],
  U8: ["uint8", Uint8Array],
  BOOL: ["bool", Uint8Array],
};

// Something that the user can act on: what happened, and the next step.
export class MeasureError extends Error {
  constructor(message, hint) {
    super(message);
    this.hint = hint;
  }
}

// Returns a Map from name to {type, dims, data}; `bytes` is a Uint8Array that the arrays look into.
export function parseTensors(bytes, where) {
  const { header, start } = parseHeader(bytes, where);
  const found = new Map();
  const ranges = [];
  for (const [name, record] of Object.entries(header)) {
    if (name === "__metadata__") continue;
    const tensor = parseTensor(bytes, start, name, record, where);
    found.set(name, tensor);
    ranges.push(record.data_offsets);
  }
  ranges.sort((a, b) => a[0] - b[0] || a[1] - b[1]);
  let end = 0;
  for (const [first, last] of ranges) {
    if (first !== end) throw damaged(where, `bytes ${Math.min(first, end)} to ${Math.max(first, end)} overlap or belong to nothing`);
    end = last;
  }
  if (start + end !== bytes.length) throw damaged(where, `it has ${bytes.length} bytes, its header says ${start + end}`);
  return found;
}

// Returns a Map of the tensors `names`; read(first, count) resolves to bytes of the file.
export async function readSomeTensors(read, names, where) {
  const length = new DataView((await read(0, 8)).slice().buffer).getBigUint64(0, true);
  const { header, start } = parseHeader(await read(0, 8 + Number(length)), where);
  const found = new Map();
  for (const name of names) {
    const [first, last] = header[name].data_offsets;
    const bytes = await read(start + first, last - first);
    found.set(name, parseTensor(bytes, 0, name, { ...header[name], data_offsets: [0, last - first] }, where));
  }
  return found;
}

function parseHeader(bytes, where) {
  if (bytes.length < 8) throw damaged(where, "it is shorter than its own header");
  const length = new DataView(bytes.buffer, bytes.byteOffset, 8).getBigUint64(0, true);
  if (length > BigInt(Math.min(MAX_HEADER_BYTES, bytes.length - 8))) throw damaged(where, `its header of ${length} bytes does not fit`);
  const start = 8 + Number(length);
  let header;
  try {
    header = JSON.parse(new TextDecoder("utf-8", { fatal: true }).decode(bytes.subarray(8, start)));
  } catch (error) {
    throw damaged(where, `its header is not JSON: ${error.message}`);
  }
  if (header === null || typeof header !== "object" || Array.isArray(header)) throw damaged(where, "its header is not an object");
  return { header, start };
}

function parseTensor(bytes, start, name, record, where) {
  const known = TYPES[record?.dtype];
  if (known === undefined) throw damaged(where, `tensor ${name} has the dtype ${record?.dtype}; known are ${Object.keys(TYPES).join(", ")}`);
  const [type, Values] = known;
  const isCount = (value) => Number.isSafeInteger(value) && value >= 0;
  const { shape, data_offsets: offsets } = record;
  const valid = Array.isArray(shape) && shape.every(isCount) && Array.isArray(offsets) && offsets.length === 2 && offsets.every(isCount);
  if (!valid) throw damaged(where, `tensor ${name} has no valid shape and data_offsets`);
  const [first, last] = offsets;
  const count = shape.reduce((product, axis) => product * axis, 1);
  if (last - first !== count * Values.BYTES_PER_ELEMENT) throw damaged(where, `tensor ${name} has ${last - first} bytes for the shape [${shape}]`);
  if (start + last > bytes.length) throw damaged(where, `tensor ${name} lies outside of the file`);
  const position = bytes.byteOffset + start + first;
  const aligned = position % Values.BYTES_PER_ELEMENT === 0;
  const data = aligned
    ? new Values(bytes.buffer, position, count)
    : new Values(bytes.slice(start + first, start + last).buffer, 0, count);
  return { type, dims: shape, data };
}

function damaged(where, problem) {
  return new MeasureError(`${where} is damaged: ${problem}`, "run `edgeadapt profile` again; check the disk that holds the job folder");
}
