// LoRA in JavaScript, checked against the vectors and the adapter folders: node consumer.mjs
import { readFileSync, readdirSync } from 'node:fs';
const json = (path) => JSON.parse(readFileSync(new URL(path, import.meta.url)));
const times = (P, Q) => P.map((row) => Q[0].map((_, j) => row.reduce((sum, p, k) => sum + p * Q[k][j], 0)));
const turn = (M) => M[0].map((_, j) => M.map((row) => row[j]));
const adapted = (W, A, B, s) => times(B, A).map((row, i) => row.map((d, j) => W[i][j] + s * d));
const scale = (c, r) => c.lora_alpha / (c.use_rslora ? Math.sqrt(r) : r);
const run = (kind, W, x) => (kind === 'embedding' ? x.map((i) => turn(W)[i]) : times(x, turn(W)));
const same = (what, got, want) => {
  if (JSON.stringify(got) !== JSON.stringify(want)) throw Error(`${what}: ${JSON.stringify(got)}, not ${JSON.stringify(want)}`);
};
let checked = 0;
for (const v of json('vectors.json').layers.filter((v) => v.kind === 'linear' || v.kind === 'embedding')) {
  const W = adapted(v.W, v.A, v.B, scale(v, v.r));
  same('merged', W, v.merged);
  same('y', run(v.kind, W, v.x).map((row) => row.map((y, i) => y + (v.b ? v.b[i] : 0))), v.y);
  checked += 1;
}
const pattern = (patterns, name, otherwise) => // the first that reaches the end of the name
  Object.entries(patterns ?? {}).find(([key]) => new RegExp(`^(.*\\.)?(${key})$`).test(name))?.[1] ?? otherwise;
for (const folder of readdirSync(new URL('folders', import.meta.url))) {
  const config = json(`folders/${folder}/adapter_config.json`), model = json(`folders/${folder}/model.json`);
  const file = readFileSync(new URL(`folders/${folder}/adapter_model.safetensors`, import.meta.url));
  const size = Number(file.readBigUInt64LE(0)), header = JSON.parse(file.subarray(8, 8 + size));
  const tensor = ({ shape: [rows, columns], data_offsets: [start] }) => [...Array(rows)].map((_, i) =>
    [...Array(columns)].map((_, j) => file.readFloatLE(8 + size + start + 4 * (i * columns + j))));
  let y = model.x;
  for (const [name, { kind, W }] of Object.entries(model.modules)) {
    const find = (letter) => header[`base_model.model.${name}.lora_${letter}.weight`] ?? header[`base_model.model.${name}.lora_embedding_${letter}`];
    const alpha = pattern(config.alpha_pattern, name, config.lora_alpha ?? 8), r = pattern(config.rank_pattern, name, config.r ?? 8);
    const s = scale({ lora_alpha: alpha, use_rslora: config.use_rslora }, r);
    y = run(kind, find('A') ? adapted(W, tensor(find('A')), tensor(find('B')), s) : W, y);
  }
  same(folder, y, model.y);
  checked += 1;
}
console.log(`${checked} vectors and folders hold`);
