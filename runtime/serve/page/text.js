// Text to ids and back, by the bundle's tokenizer.json and chat template: tokenizer.py and prompts.py in
// JavaScript. What reads those files is injected: Tokenizer of @huggingface/tokenizers, Template of
// @huggingface/jinja.

const UNFINISHED = "\ufffd"; // what a decoder gives for bytes that are not (yet) a character
const CONTEXT = 6; // ids decoded again before new ones: a decoder may treat the start of a text in its own way
const ASKS_FOR_IMAGES = /(type['"]?\]?\s*==|equalto['"]\s*,)\s*['"]image['"]/;

export class Text {
  // files: the content of tokenizer.json, and of tokenizer_config.json and chat_template.jinja, or null;
  // vision: manifest.model.vision, or null.
  constructor({ tokenizer, config, template }, { Tokenizer, Template }, vision) {
    const read = JSON.parse(tokenizer);
    this.config = config ? JSON.parse(config) : {};
    this.tokenizer = new Tokenizer(read, this.config);
    this.vision = vision;
    const added = read.added_tokens ?? [];
    this.skipped = new Set(added.filter((token) => token.special).map((token) => token.id));
    this.byteIds = JSON.stringify(read.decoder ?? null).includes("ByteFallback") ? bytes(read.model.vocab) : new Set();
    this.imageToken = added.find((token) => token.id === vision?.image_token)?.content;
    this.takesParts = Boolean(template && ASKS_FOR_IMAGES.test(template));
    this.template = template && Template ? new Template(template) : null;
  }

  // special: adds the tokens that begin and end a text.
  encode(text, special = true) {
    return this.tokenizer.encode(this.expanded(text), { add_special_tokens: special }).ids;
  }

  decode(ids) {
    const told = ids.filter((id) => !this.skipped.has(id));
    return told.length ? this.tokenizer.decode(told, { skip_special_tokens: true, clean_up_tokenization_spaces: false }) : "";
  }

  // messages: {role, content}, a content a text or parts {type: "text", text} and {type: "image"}.
  encodeChat(messages) {
    if (!this.template) throw new Error("The bundle has no chat template; use a plain prompt.");
    const special = Object.fromEntries(
      Object.entries(this.config)
        .filter(([name, token]) => name.endsWith("_token") && token)
        .map(([name, token]) => [name, token.content ?? token]),
    );
    const given = messages.map((message) => (this.takesParts && this.vision ? inParts : inText)(message, this.vision?.mark ?? ""));
    return this.encode(this.template.render({ ...special, messages: given, add_generation_prompt: true }), false);
  }

  expanded(text) {
    const { vision, imageToken } = this;
    if (!vision || !imageToken) return text;
    return text.replaceAll(vision.mark, vision.before + imageToken.repeat(vision.image_tokens) + vision.after);
  }
}

const inText = ({ content, ...rest }, mark) => ({
  ...rest,
  content: typeof content === "string" ? content : content.map((part) => (part.type === "text" ? part.text : mark)).join(""),
});
const inParts = ({ content, ...rest }) => ({
  ...rest,
  content: typeof content === "string" ? [{ type: "text", text: content }] : content.map((part) => (part.type === "text" ? part : { type: "image" })),
});

function bytes(vocab) {
  const names = [...Array(256).keys()].map((byte) => `<0x${byte.toString(16).toUpperCase().padStart(2, "0")}>`);
  const ids = Array.isArray(vocab) ? new Map(vocab.map(([name], id) => [name, id])) : new Map(Object.entries(vocab));
  return new Set(names.map((name) => ids.get(name)).filter((id) => id !== undefined));
}

// Text of ids that come one by one, in whole characters. The pieces join to the decoded whole.
export class Stream {
  constructor(text) {
    Object.assign(this, { text, ids: [], emitted: "", start: 0, read: 0 });
  }

  push(token) {
    if (this.text.skipped.has(token)) return "";
    this.ids.push(token);
    if (this.text.byteIds.has(token)) return "";
    const whole = this.text.decode(this.ids.slice(this.start));
    if (whole.endsWith(UNFINISHED)) return "";
    const piece = whole.slice(this.text.decode(this.ids.slice(this.start, this.read)).length);
    this.read = this.ids.length;
    this.start = Math.max(0, this.read - CONTEXT);
    this.emitted += piece;
    return piece;
  }

  flush() {
    return this.read === this.ids.length ? "" : this.text.decode(this.ids).slice(this.emitted.length);
  }
}

// Cuts a stream of text before the first stop text.
export class Stops {
  constructor(stops) {
    this.stops = stops === undefined || stops === null ? [] : [stops].flat();
    this.held = "";
  }

  // [text that can go out, whether a stop text was found]; holds back what may begin one.
  push(piece) {
    const text = this.held + piece;
    const found = this.stops.map((stop) => text.indexOf(stop)).filter((at) => at >= 0);
    if (found.length) {
      this.held = "";
      return [text.slice(0, Math.min(...found)), true];
    }
    const keep = Math.max(0, ...this.stops.map((stop) => overlap(text, stop)));
    this.held = text.slice(text.length - keep);
    return [text.slice(0, text.length - keep), false];
  }

  flush() {
    const held = this.held;
    this.held = "";
    return held;
  }
}

function overlap(text, stop) {
  for (let size = Math.min(text.length, stop.length - 1); size > 0; size--) {
    if (text.endsWith(stop.slice(0, size))) return size;
  }
  return 0;
}
