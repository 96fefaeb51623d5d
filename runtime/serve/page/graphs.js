// The two graphs of a bundle over one cache, driven by manifest.json alone: roles of ports, and `calling`.

const CACHE = new Set(["key", "value"]);
const ARRAYS = { int64: BigInt64Array, float32: Float32Array, float16: Uint16Array };
const size = (port) => port.shape.reduce((product, length) => product * length, 1);
const portOf = (ports, role) => ports.find((port) => port.role === role);
const slot = (port) => `${port.layer} ${port.role}`;

export class Graphs {
  // ort: onnxruntime-web or -node; open(entry): the arguments of its InferenceSession.create; oneAtATime: hold
  // one graph in memory; inPlace: whether this ort writes to the outputs that it is given.
  constructor(ort, manifest, open, { oneAtATime = false, inPlace = false } = {}) {
    Object.assign(this, { ort, manifest, open, oneAtATime, inPlace, sessions: new Map(), cached: [], cache: new Map(), sees: false });
    const { decode } = (this.entries = entriesOf(manifest));
    this.ctx = decode.shape.ctx;
    this.stays = manifest.calling.prompt.continues && decode.shape.slack === null;
  }

  async load(progress = () => {}) {
    if (this.oneAtATime) return;
    for (const name of Object.keys(this.entries)) {
      progress(name);
      await this.session(name);
    }
  }

  // Features [T, hidden] of a picture's pixel values.
  async look(values) {
    const { vision } = this.entries, session = await this.session("vision");
    const port = portOf(vision.inputs, "pixels");
    const found = await session.run({ [port.name]: new this.ort.Tensor(port.dtype, values, port.shape) });
    return found[portOf(vision.outputs, "image_features").name].data.slice();
  }

  // Logits [V] after the prompt's last token. It goes on behind what the cache holds of it already, where no picture
  // is in it. features: of each picture that the prompt's image tokens stand for, in order.
  async prefill(ids, features, signal, pause) {
    const { prefill } = this.entries, { chunk, continues } = this.manifest.calling.prompt;
    if (ids.length > (continues ? this.ctx : chunk)) {
      throw new Error(`The prompt has ${ids.length} tokens and the bundle takes ${continues ? this.ctx : chunk}; shorten it.`);
    }
    const places = this.places(ids, features);
    const held = this.stays && !this.sees && !features.length ? common(this.cached, ids) : 0;
    this.sees = features.length > 0;
    if (held === 0) this.clear(continues ? prefill : null);
    let fed = (this.cached = this.cached.slice(0, held)), logits;
    while (fed.length < ids.length) {
      if (signal?.aborted) return null;
      const count = this.uncut(places, fed.length, Math.min(chunk, ids.length - fed.length));
      const piece = ids.slice(fed.length, fed.length + count);
      this.cached = []; // right or empty, whatever ends the call
      logits = await this.run("prefill", piece, fed.length, places.slice(fed.length, fed.length + count));
      this.cached = fed = fed.concat(piece);
      await pause();
    }
    return logits;
  }

  // For each token the features' row that takes its place, and the number of its picture; or null.
  places(ids, features) {
    const { vision } = this.manifest.model, size = vision?.image_tokens;
    const wanted = vision ? ids.filter((id) => id === vision.image_token).length / size : 0;
    if (wanted !== features.length) {
      throw new Error(`The prompt has room for ${wanted} pictures and ${features.length} are given; give as many.`);
    }
    let used = 0;
    return ids.map((id) => {
      if (!features.length || id !== vision.image_token) return null;
      const picture = Math.floor(used / size), row = used++ % size, width = features[picture].length / size;
      return { picture, row: features[picture].subarray(row * width, (row + 1) * width) };
    });
  }

  // Tokens of a call that must not end within a picture.
  uncut(places, start, count) {
    const last = places[start + count - 1], next = places[start + count];
    if (!this.manifest.calling.prompt.whole_images || !last || next?.picture !== last.picture) return count;
    return places.findIndex((place) => place?.picture === last.picture) - start;
  }

  async decode(token) {
    const fed = this.cached;
    this.cached = [];
    const logits = await this.run("decode", [token], fed.length);
    fed.push(token);
    this.cached = fed;
    return logits;
  }

  reset() {
    this.cached = [];
  }

  async release() {
    for (const session of this.sessions.values()) await session.release();
    this.sessions.clear();
  }

  async run(name, tokens, past, places = []) {
    const entry = this.entries[name], session = await this.session(name);
    const feeds = entry.shape.embeds ? await this.embedded(tokens, places) : {};
    const first = places.find(Boolean)?.picture, numbers = places.map((place) => (place ? 1 + place.picture - first : 0));
    const small = { token_ids: tokens, valid_length: [tokens.length], past_length: [past], picture_numbers: numbers };
    for (const port of entry.inputs) {
      if (CACHE.has(port.role)) feeds[port.name] = this.cache.get(slot(port));
      else if (small[port.role]) feeds[port.name] = this.tensor(port, small[port.role], this.fill(port.role));
    }
    const found = await session.run(feeds, this.fetches(entry));
    const presents = entry.outputs.filter((port) => CACHE.has(port.role));
    if (entry.shape.ctx === null) this.copy(presents, found, tokens.length);
    else for (const port of presents) this.cache.set(slot(port), found[port.name]);
    return found[portOf(entry.outputs, "logits").name].data;
  }

  fill(role) {
    return role === "token_ids" ? this.manifest.calling.tokens.pad : 0;
  }

  // The outputs that lie in their inputs' buffers, by the aliases' permission.
  fetches(entry) {
    if (!this.inPlace || !entry.aliases.length || !entry.aliases.every((alias) => alias.same_buffer)) {
      return entry.outputs.map((port) => port.name);
    }
    const inputs = new Map(entry.inputs.map((port) => [port.name, port]));
    const pasts = new Map(entry.aliases.map((alias) => [alias.output, this.cache.get(slot(inputs.get(alias.input)))]));
    return Object.fromEntries(entry.outputs.map((port) => [port.name, pasts.get(port.name) ?? null]));
  }

  async embedded(tokens, places) {
    const { embed, prefill } = this.entries, session = await this.session("embed");
    const port = portOf(embed.inputs, "token_ids");
    const found = await session.run({ [port.name]: this.tensor(port, tokens, this.fill("token_ids")) });
    const output = portOf(embed.outputs, "embeddings");
    places.forEach((place, index) => place && found[output.name].data.set(place.row, index * place.row.length));
    return { [portOf(prefill.inputs, "embeddings").name]: found[output.name] };
  }

  tensor(port, values, fill) {
    const data = new ARRAYS[port.dtype](size(port)), wide = port.dtype === "int64" ? BigInt : Number;
    data.fill(wide(fill));
    values.forEach((value, index) => (data[index] = wide(value)));
    return new this.ort.Tensor(port.dtype, data, port.shape);
  }

  // Fresh buffers as the graph takes them; those of the decode where the prefill has none.
  clear(entry) {
    for (const port of (entry ?? this.entries.decode).inputs.filter((each) => CACHE.has(each.role))) {
      if (!this.cache.has(slot(port))) this.cache.set(slot(port), this.tensor(port, [], this.manifest.calling.cache.initial));
    }
  }

  // The filled slots of a prefill with buffers of its own [B, KV, P, D] into those of the decode [B, KV, C, D].
  copy(presents, found, filled) {
    for (const port of presents) {
      const from = found[port.name].data, into = this.cache.get(slot(port)), [, heads, slots, width] = port.shape;
      for (let head = 0; head < heads; head++) {
        const start = head * slots * width;
        into.data.set(from.subarray(start, start + filled * width), head * into.dims[2] * width);
      }
    }
  }

  async session(name) {
    if (!this.sessions.has(name)) {
      if (this.oneAtATime && name !== "embed") await this.release();
      this.sessions.set(name, await this.ort.InferenceSession.create(...(await this.open(this.entries[name]))));
    }
    return this.sessions.get(name);
  }
}

function entriesOf(manifest) {
  const of = (role) => Object.values(manifest.graphs).filter((graph) => graph.shape.role === role).at(0);
  const entries = { prefill: of("prefill"), decode: of("decode"), ...(of("vision") && { vision: of("vision") }) };
  if (!entries.prefill || !entries.decode) throw new Error("The bundle has no prefill and decode; run 'stillgraph export bundle'.");
  if (entries.decode.shape.batch !== 1) throw new Error(`The bundle has ${entries.decode.shape.batch} rows and this driver takes 1; export it with --batch 1.`);
  return entries.prefill.shape.embeds ? { embed: of("embed"), ...entries } : entries;
}

function common(cached, ids) {
  let count = 0;
  while (count < Math.min(cached.length, ids.length - 1) && cached[count] === ids[count]) count++;
  return count;
}
