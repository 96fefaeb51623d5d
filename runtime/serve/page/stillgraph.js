// A bundle of Stillgraph in JavaScript: read by its manifest, run by onnxruntime-web or onnxruntime-node.
//
//     const engine = await load({ ort, tokenizers, jinja, read, open });
//     for await (const step of engine.stream("Once upon a time", { maxNewTokens: 64 })) show(step.text);

import { Graphs } from "./graphs.js";
import { pixels } from "./pictures.js";
import { sampler } from "./sampling.js";
import { Stops, Stream, Text } from "./text.js";

export const FORMAT_VERSION = 5;

// read(path): a file of the bundle as text, or null where there is none; open(entry, manifest): the arguments of
// InferenceSession.create for a graph; tokenizers, jinja: modules of @huggingface; progress(name): of each graph.
export async function load({ ort, tokenizers, jinja, read, open, progress, ...options }) {
  const manifest = checked(await read("manifest.json"));
  const needs = manifest.requires.onnxruntime, has = ort.env?.versions?.common;
  if (needs && has && older(has, needs)) throw new Error(`The bundle needs ONNX Runtime ${needs} and this is ${has}; export it with --target portable.`);
  const tokenizer = tokenizers ? await read("tokenizer.json") : null;
  const parts = { tokenizer, config: await read("tokenizer_config.json"), template: await read("chat_template.jinja") };
  const modules = { Tokenizer: tokenizers?.Tokenizer, Template: jinja?.Template };
  const text = tokenizer === null ? null : new Text(parts, modules, manifest.model.vision);
  const graphs = new Graphs(ort, manifest, (entry) => open(entry, manifest), options);
  await graphs.load(progress);
  return new Engine(manifest, graphs, text);
}

// The manifest of a text. Throws an Error of one sentence for another format.
export function checked(source) {
  if (source === null) throw new Error("There is no manifest.json; name a folder made by 'stillgraph export'.");
  const manifest = JSON.parse(source);
  if (manifest.format_version !== FORMAT_VERSION) {
    throw new Error(`The bundle has format version ${manifest.format_version} and this driver understands ${FORMAT_VERSION}; export it again.`);
  }
  return manifest;
}

// A loaded bundle. It serves one request at a time.
export class Engine {
  constructor(manifest, graphs, text) {
    Object.assign(this, { manifest, graphs, text, busy: false });
  }

  // Whether it takes pictures.
  get sees() {
    return Boolean(this.graphs.entries.vision && this.manifest.calling.images);
  }

  // prompt: a text, ids, or a chat of {role, content}.
  ids(prompt) {
    const ids = typeof prompt === "string" ? this.words().encode(prompt) : Array.from(prompt);
    if (!ids.length) throw new Error("The prompt is empty; give at least one token.");
    const found = typeof ids[0] === "object" ? this.words().encodeChat(ids) : ids;
    const vocab = this.manifest.model.vocab_size, wrong = found.find((id) => !Number.isInteger(id) || id < 0 || id >= vocab);
    if (wrong !== undefined) throw new Error(`Token id ${wrong} is outside the vocabulary of ${vocab}; give ids from 0 to ${vocab - 1}.`);
    return found;
  }

  // Steps {token, text, logits, finishReason, elapsed}: finishReason is null but in the last, then "stop",
  // "length", "context" or "aborted"; elapsed is in ms since the request; logits [V] are the raw ones, valid until
  // the next step. Options: maxNewTokens, temperature, topK, topP, minP, repetitionPenalty, seed, stop, stopTokens,
  // pictures {data: RGBA bytes, width, height} of the model's size, in the prompt's order, signal of an AbortController,
  // and pause(), awaited between calls for others to have their turn.
  async *stream(prompt, { maxNewTokens = 128, stop, stopTokens, pictures = [], signal, pause = async () => {}, ...sampling } = {}) {
    if (this.busy) throw new Error("Another request is running; finish or abort it first.");
    this.busy = true;
    try {
      const began = performance.now(), ids = this.ids(prompt), choose = sampler(sampling);
      const row = new Row(this.text, stop, stopTokens ?? this.manifest.calling.tokens.stop, maxNewTokens);
      const features = [];
      for (const picture of pictures) features.push(await this.graphs.look(pixels(picture, this.manifest)));
      let logits = await this.graphs.prefill(ids, features, signal, pause);
      while (logits !== null && !signal?.aborted) {
        const room = ids.length < this.graphs.ctx, token = choose(logits, ids);
        ids.push(token);
        const [text, finishReason] = row.step(token, room);
        yield { token, text, logits, finishReason, elapsed: performance.now() - began };
        if (finishReason) return;
        await pause();
        if (!signal?.aborted) logits = await this.graphs.decode(token);
      }
      yield { token: null, text: row.flush(), logits: null, finishReason: "aborted", elapsed: performance.now() - began };
    } finally {
      this.busy = false;
    }
  }

  words() {
    if (!this.text) throw new Error("The bundle has no tokenizer, or none was given; give token ids.");
    return this.text;
  }
}

// A text on its way: what can be shown of it, and why it ended.
class Row {
  constructor(text, stop, stopTokens, most) {
    Object.assign(this, { stream: text && new Stream(text), stops: new Stops(stop), ends: new Set(stopTokens), left: most });
  }

  step(token, room) {
    const stopped = this.ends.has(token);
    const [text, cut] = this.stops.push(stopped || !this.stream ? "" : this.stream.push(token));
    this.left -= 1;
    const reason = stopped || cut ? "stop" : this.left === 0 ? "length" : room ? null : "context";
    if (cut || reason === null) return [text, reason];
    const [rest, found] = this.stops.push(this.stream ? this.stream.flush() : "");
    return [text + rest + this.stops.flush(), found ? "stop" : reason];
  }

  flush() {
    const [rest] = this.stops.push(this.stream ? this.stream.flush() : "");
    return rest + this.stops.flush();
  }
}

function older(has, needs) {
  const [a, b] = [has, needs].map((version) => version.split(".").map(Number));
  for (let index = 0; index < b.length; index++) {
    if ((a[index] ?? 0) !== b[index]) return (a[index] ?? 0) < b[index];
  }
  return false;
}
