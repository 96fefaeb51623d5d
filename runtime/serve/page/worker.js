// The bundle in a worker: fetched, loaded, and asked. Messages both ways are [kind, content].

import { answers } from "./golden.js";
import { frame } from "./pictures.js";
import { checked, load } from "./stillgraph.js";

const MOST = 1.9e9; // bytes of weights: a heap of WebAssembly has 4 GiB, and they are copied into it
const CACHE = "stillgraph";
const tell = (kind, content) => postMessage([kind, content]);
const channel = new MessageChannel();
let held = 0; // bytes of the bundle's files
let engine, ready = false, running = null;

// onnxruntime-web does not say how large its heap is, and browsers' own measures leave a shared one out.
const heaps = [];
WebAssembly.Memory = class extends WebAssembly.Memory {
  constructor(...given) {
    super(...given);
    heaps.push(this);
  }
};
const memory = () => heaps.reduce((sum, { buffer }) => sum + buffer.byteLength, held);

// Lets messages in between two calls of a graph; a timer would wait 4 ms.
const pause = () => new Promise((done) => {
  channel.port1.onmessage = done;
  channel.port2.postMessage(null);
});

const DOES = {
  async load() {
    const [ort, tokenizers, jinja] = await packages();
    const source = await text("manifest.json"), manifest = checked(source), size = manifest.weights.file.nbytes;
    if (size > MOST) {
      throw new Error(`The bundle's weights are ${gigabytes(size)} GB and a browser can hold ${gigabytes(MOST)} GB; run it with 'stillgraph chat', or export it with fewer bits.`);
    }
    const threads = globalThis.crossOriginIsolated ? Math.min(4, navigator.hardwareConcurrency || 1) : 1;
    ort.env.wasm.numThreads = threads;
    const files = await fetched([manifest.weights.file, ...Object.values(manifest.graphs).filter(used).map((graph) => graph.file)]);
    const externalData = [{ path: manifest.weights.file.path, data: files.get(manifest.weights.file.path) }];
    engine = await load({
      ort, tokenizers, jinja, oneAtATime: 2 * size > MOST,
      read: (name) => (name === "manifest.json" ? source : text(name)),
      open: (entry) => [files.get(entry.file.path), { executionProviders: ["wasm"], externalData }],
      progress: (name) => tell("progress", { state: `Preparing ${name}`, done: null }),
    });
    tell("ready", { memory: memory(), model: manifest.source.id.split("/").at(-1), threads, chats: Boolean(engine.words().template), sees: engine.sees });
    ready = true;
    await forget(manifest);
  },

  // files: of the pictures that the prompt has, in its order.
  async ask({ prompt, files }) {
    running = new AbortController();
    let first = null, count = 0, reason;
    const pictures = await Promise.all(files.map(rgba));
    for await (const step of engine.stream(prompt, { maxNewTokens: 256, pictures, signal: running.signal, pause })) {
      first ??= step.elapsed;
      const tpot = count ? (step.elapsed - first) / count : null;
      if (step.token !== null) count += 1;
      tell("step", { text: step.text, ttft: first, tpot });
      reason = step.finishReason;
    }
    running = null;
    tell("done", { reason, memory: memory() });
  },

  stop: async () => running?.abort(),

  async golden() {
    for await (const line of answers(engine, JSON.parse(await text("golden.json")), decode)) tell("golden", line);
    tell("golden", null);
  },
};

onmessage = async ({ data: [kind, content] }) => {
  try {
    await DOES[kind](content);
  } catch (error) {
    running = null;
    tell("error", { message: error.message, fatal: !ready });
  }
};

const used = ({ shape }) => ["prefill", "decode", "embed", "vision"].includes(shape.role) && !shape.int8_activations;
const decode = async (base64) => rgba(await (await fetch(`data:image/png;base64,${base64}`)).blob());
const gigabytes = (bytes) => (bytes / 1e9).toFixed(1);

// A file of a picture as RGBA bytes of the model's size. The browser resizes it, not quite as Pillow would.
async function rgba(file) {
  const { model: { vision: { width, height } }, calling: { images } } = engine.manifest;
  let bitmap;
  try {
    bitmap = await createImageBitmap(file, { colorSpaceConversion: "none", premultiplyAlpha: "none" });
  } catch {
    throw new Error(`${file.name ?? "The file"} is no picture that this browser can read; take a PNG or a JPEG.`);
  }
  const context = new OffscreenCanvas(width, height).getContext("2d", { willReadFrequently: true });
  const part = frame(bitmap.width, bitmap.height, images);
  context.imageSmoothingQuality = "high";
  context.drawImage(bitmap, part.x, part.y, part.width, part.height, 0, 0, width, height);
  return context.getImageData(0, 0, width, height);
}

async function packages() {
  const names = ["ort.wasm.bundle.min.mjs", "tokenizers.mjs", "jinja.js"];
  try {
    return await Promise.all(names.map((name) => import(`./packages/${name}`)));
  } catch {
    throw new Error("The packages of this page are not there; run 'python -m stillgraph.serve.packages' and load it again.");
  }
}

async function text(name) {
  const response = await fetch(name);
  if (response.status === 404) return null;
  if (!response.ok) throw new Error(`${name} cannot be fetched (${response.status}); load the page again.`);
  return response.text();
}

// Bytes by path. A file's address ends in its hash, so a copy that is kept is the right one.
async function fetched(files) {
  const total = files.reduce((sum, file) => sum + file.nbytes, 0), found = new Map();
  let done = 0;
  for (const { path, nbytes, sha256 } of files) {
    const response = await fetch(`${path}?${sha256}`), bytes = new Uint8Array(nbytes);
    if (!response.ok) throw new Error(`${path} cannot be fetched (${response.status}); load the page again.`);
    let filled = 0;
    for (const reader = response.body.getReader(); ; ) {
      const { value } = await reader.read();
      if (!value) break;
      if (filled + value.length > nbytes) throw new Error(`${path} is not as the manifest says; load the page again.`);
      bytes.set(value, filled);
      filled += value.length;
      done += value.length;
      tell("progress", { state: `Loading ${(done / 1e6).toFixed(1)} of ${(total / 1e6).toFixed(1)} MB`, done: done / total });
    }
    if (filled !== nbytes) throw new Error(`${path} ended after ${filled} of ${nbytes} bytes; load the page again.`);
    found.set(path, bytes);
    held += nbytes;
  }
  return found;
}

// Drops what is kept of bundles that were here before.
async function forget({ weights, graphs }) {
  if (!globalThis.caches) return;
  const cache = await caches.open(CACHE), kept = new Set([weights, ...Object.values(graphs)].map(({ file }) => `?${file.sha256}`));
  for (const request of await cache.keys()) {
    const { search } = new URL(request.url);
    if (search && !kept.has(search)) await cache.delete(request);
  }
}
