// node generate.mjs --prompt "Once upon a time"     a bundle's text, by onnxruntime-node.
// node generate.mjs --golden golden.json           a line of JSON for each case
// Beside it lie stillgraph.js and its modules, and what `npm ci --ignore-scripts` makes of package.json.
// Results go to stdout; exit codes are 0 done, 2 wrong use or bad input.

import { existsSync, readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { dirname, join, resolve } from "node:path";
import { fileURLToPath } from "node:url";
import { parseArgs } from "node:util";

import { answers } from "./golden.js";
import { load } from "./stillgraph.js";

const HERE = dirname(fileURLToPath(import.meta.url));

const OPTIONS = {
  bundle: { type: "string", default: HERE }, packages: { type: "string", default: HERE },
  golden: { type: "string" },
  prompt: { type: "string" }, chat: { type: "boolean" }, "token-ids": { type: "string" },
  "max-new-tokens": { type: "string", default: "128" }, temperature: { type: "string", default: "0" },
  "top-k": { type: "string" }, "top-p": { type: "string" }, "min-p": { type: "string" },
  "repetition-penalty": { type: "string" }, seed: { type: "string" }, stop: { type: "string", multiple: true },
  image: { type: "string", multiple: true }, json: { type: "boolean" }, threads: { type: "string" },
};
const number = (value) => (value === undefined ? undefined : Number(value));

// In MB. On Linux not Node.js's own figure: a process begins with the peak of the one that started it.
function peak() {
  const status = "/proc/self/status";
  const kib = existsSync(status) ? /VmHWM:\s+(\d+)/.exec(readFileSync(status, "utf8"))[1] : process.resourceUsage().maxRSS;
  return (Number(kib) * 1024) / 1e6;
}

async function main() {
  const { values: given } = parseArgs({ options: OPTIONS });
  const path = (name) => join(given.bundle, name), began = performance.now();
  const [ort, tokenizers, jinja, { PNG }] = packages(given.packages);
  const session = { executionProviders: ["cpu"], intraOpNumThreads: number(given.threads) ?? 0 };
  const engine = await load({
    ort, tokenizers, jinja, inPlace: true,
    read: async (name) => (existsSync(path(name)) ? readFileSync(path(name), "utf8") : null),
    open: async (entry) => [path(entry.file.path), session],
  });
  const loadMs = performance.now() - began;
  const decode = (base64) => PNG.sync.read(Buffer.from(base64, "base64"));
  if (given.golden) return prove(engine, given.golden, decode, { load_ms: loadMs, versions: ort.env.versions });
  const ids = given["token-ids"]?.split(",").map(Number);
  if ((ids === undefined) === (given.prompt === undefined)) throw new Error("Give one of --prompt and --token-ids.");
  const pictures = (given.image ?? []).map((image) => decode(readFileSync(image).toString("base64")));
  await write(engine, ids ?? asked(engine, given), { ...given, pictures }, loadMs);
}

// A text, or a chat of one message; pictures come first, a line each.
function asked(engine, { prompt, chat, image = [] }) {
  if (!chat) return `${engine.manifest.model.vision?.mark}\n`.repeat(image.length) + prompt;
  if (!image.length) return [{ role: "user", content: prompt }];
  const others = image.slice(1).flatMap(() => [{ type: "image" }, { type: "text", text: "\n" }]);
  return [{ role: "user", content: [...others, { type: "image" }, { type: "text", text: `\n${prompt}` }] }];
}

// onnxruntime-node, the two of @huggingface and pngjs, from a folder's node_modules.
function packages(folder) {
  const require = createRequire(join(resolve(folder), "package.json"));
  try {
    return ["onnxruntime-node", "@huggingface/tokenizers", "@huggingface/jinja", "pngjs"].map((name) => require(name));
  } catch (error) {
    throw new Error(`${error.message.split("\n")[0]}; run 'npm ci --ignore-scripts' in ${folder}.`);
  }
}

async function prove(engine, path, decode, told) {
  const golden = JSON.parse(readFileSync(path, "utf8"));
  for await (const found of answers(engine, golden, decode)) console.log(JSON.stringify({ ...found, ...told, peak_rss_mb: peak() }));
}

async function write(engine, prompt, given, loadMs) {
  const options = {
    maxNewTokens: number(given["max-new-tokens"]), temperature: number(given.temperature), topK: number(given["top-k"]),
    topP: number(given["top-p"]), minP: number(given["min-p"]), seed: number(given.seed), stop: given.stop, pictures: given.pictures,
    repetitionPenalty: number(given["repetition-penalty"]),
  };
  const steps = [];
  for await (const { token, text, finishReason, elapsed } of engine.stream(prompt, options)) {
    steps.push({ token, text, finishReason, elapsed });
    if (!given.json) process.stdout.write(text);
  }
  const first = steps[0].elapsed, last = steps.at(-1);
  if (!given.json) return process.stdout.write("\n");
  const report = {
    prompt_tokens: engine.ids(prompt).length, tokens: steps.map((step) => step.token),
    text: steps.map((step) => step.text).join(""), finish_reason: last.finishReason, load_ms: loadMs, ttft_ms: first,
    tpot_ms: steps.length > 1 ? (last.elapsed - first) / (steps.length - 1) : null,
    peak_rss_mb: peak(), peak_pss_mb: null,
  };
  console.log(JSON.stringify(report));
}

main().catch((error) => {
  console.error(`error: ${error.message}`);
  process.exitCode = 2;
});
