// LoRA in JavaScript. `node consumer.mjs` checks it against the vectors and the adapter folders.
// `node consumer.mjs FOLDER` reads a model.json from standard input, and prints its output with the folder's adapter.
import { readFileSync, readdirSync } from 'node:fs';
import { pathToFileURL } from 'node:url';
const json = (path) => JSON.parse(readFileSync(new URL(path, import.meta.url)));
const times = (P, Q) => P.map((row) => Q[0].map((_, j) => row.reduce((sum, p, k) => sum + p * Q[k][j], 0)));
const turn = (M) => M[0].map((_, j) => M.map((row) => row[j]));
const adapted = (W, A, B, s) => times(B, A).map((row, i) => row.map((d, j) => W[i][j] + s * d));
const scale = (c, r) => c.lora_alpha / (c.use_rslora ? Math.sqrt(r) : r);
const run = (kind, W, x) => {
  if (kind === 'norm') return x.map((row) => row.map((value, i) => W[i] * value));
  return kind === 'embedding' ? x.map((i) => turn(W)[i]) : times(x, turn(W));
};
const same = (what, got, want) => {
  if (JSON.stringify(got) !== JSON.stringify(want)) throw Error(`${what}: ${JSON.stringify(got)}, not ${JSON.stringify(want)}`);
};
const pattern = (patterns, name, otherwise) => // the first that reaches the end of the name
  Object.entries(patterns ?? {}).find(([key]) => new RegExp(`^(.*\\.)?(${key})$`).test(name))?.[1] ?? otherwise;
const bfloat16 = (file, at) => { // the upper half of a float32
  const four = new DataView(new ArrayBuffer(4));
  four.setUint16(0, file.readUInt16LE(at));
  return four.getFloat32(0);
};
const float16 = (file, at) => {
  const bits = file.readUInt16LE(at), sign = bits >> 15 ? -1 : 1, exponent = (bits >> 10) & 31, fraction = (bits & 1023) / 1024;
  if (exponent === 31) return fraction ? NaN : sign * Infinity;
  return sign * (exponent ? 2 ** (exponent - 15) * (1 + fraction) : 2 ** -14 * fraction);
};
const dtypes = {
  F64: [8, (file, at) => file.readDoubleLE(at)], F32: [4, (file, at) => file.readFloatLE(at)], F16: [2, float16], BF16: [2, bfloat16],
};
const output = (place, model) => { // place: the URL of a folder; it ends in a slash
  const config = json(new URL('adapter_config.json', place));
  const file = readFileSync(new URL('adapter_model.safetensors', place));
  const size = Number(file.readBigUInt64LE(0)), header = JSON.parse(file.subarray(8, 8 + size));
  const tensor = ({ dtype, shape: [rows, columns], data_offsets: [start] }) => [...Array(rows)].map((_, i) =>
    [...Array(columns)].map((_, j) => dtypes[dtype][1](file, 8 + size + start + dtypes[dtype][0] * (i * columns + j))));
  let y = model.x;
  for (const [name, { kind, W, b }] of Object.entries(model.modules)) {
    const find = (letter) => header[`base_model.model.${name}.lora_${letter}.weight`] ?? header[`base_model.model.${name}.lora_embedding_${letter}`];
    const alpha = pattern(config.alpha_pattern, name, config.lora_alpha ?? 8), r = pattern(config.rank_pattern, name, config.r ?? 8);
    const s = scale({ lora_alpha: alpha, use_rslora: config.use_rslora }, r);
    const V = find('A') ? adapted(W, tensor(find('A')), tensor(find('B')), s) : W;
    y = run(kind, V, y).map((row) => row.map((value, i) => value + (b ? b[i] : 0)));
  }
  return y;
};
if (process.argv[2]) {
  console.log(JSON.stringify(output(pathToFileURL(`${process.argv[2]}/`), JSON.parse(readFileSync(0)))));
  process.exit();
}
let checked = 0;
for (const v of json('vectors.json').layers.filter((v) => v.kind === 'linear' || v.kind === 'embedding')) {
  const W = adapted(v.W, v.A, v.B, scale(v, v.r));
  same('merged', W, v.merged);
  same('y', run(v.kind, W, v.x).map((row) => row.map((y, i) => y + (v.b ? v.b[i] : 0))), v.y);
  checked += 1;
}
for (const folder of readdirSync(new URL('folders', import.meta.url))) {
  const place = new URL(`folders/${folder}/`, import.meta.url), model = json(new URL('model.json', place));
  same(folder, output(place, model), model.y);
  checked += 1;
}
console.log(`${checked} vectors and folders hold`);
