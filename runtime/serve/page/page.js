// The page: what is said and shown. The bundle is in a worker, so that nothing here ever waits for it.

const at = (id) => document.getElementById(id);
const [chat, form, prompt, send, again] = ["chat", "form", "prompt", "send", "again"].map(at);
const image = at("image");
let worker, messages = [], files = [], answer = null, takesChats = true;
let missing = null; // what to say of a file that neither a server nor the kept copies have

// A module whose only function is (result v128) i32.const 0, i8x16.splat, i8x16.popcnt.
const SIMD = [0, 97, 115, 109, 1, 0, 0, 0, 1, 5, 1, 96, 0, 1, 123, 3, 2, 1, 0, 10, 10, 1, 8, 0, 65, 0, 253, 15, 253, 98, 11];

async function start() {
  if (!globalThis.WebAssembly || !globalThis.Worker) return wrong("This browser has no WebAssembly; use a newer one.");
  if (!WebAssembly.validate(Uint8Array.from(SIMD))) return wrong("WebAssembly has no SIMD in this browser or on this CPU; use a newer one.");
  await offline();
  worker = new Worker("worker.js", { type: "module" });
  worker.onerror = (event) => wrong(missing ?? `The page's worker did not start (${event.message || "a file is missing"}).`);
  worker.onmessage = ({ data: [kind, told] }) => HEARD[kind](told);
  worker.postMessage(["load"]);
}

// Whatever is fetched from here on is kept by the service worker, where the browser lets a page have one.
async function offline() {
  const { serviceWorker } = navigator;
  if (!serviceWorker) return;
  try {
    serviceWorker.onmessage = ({ data: [kind, told] }) => HEARD[kind](told);
    await serviceWorker.register("sw.js");
    await serviceWorker.ready;
    if (!serviceWorker.controller) await new Promise((done) => (serviceWorker.oncontrollerchange = done));
  } catch (error) {
    console.warn(`The page will not work offline: ${error.message}`);
  }
}

const HEARD = {
  progress({ state, done }) {
    at("state").textContent = state;
    if (done === null) at("bar").removeAttribute("value");
    else at("bar").value = done;
  },
  ready({ model, threads, chats, sees, memory }) {
    at("loading").remove();
    takesChats = chats;
    at("picture").hidden = !(sees && chats);
    at("model").textContent = document.title = model;
    at("threads").textContent = threads;
    if (!chats) add("note", "This bundle has no chat template: it continues each text on its own.");
    prompt.disabled = send.disabled = false;
    document.body.dataset.state = "ready";
    prompt.focus();
    measured(memory);
    const kept = navigator.serviceWorker?.controller;
    if (kept) kept.postMessage(null);
    else worksOffline("no", "This browser keeps no files of the page: it must be of this machine or come by https, and have service workers");
  },
  settled() {
    if (at("offline").textContent === "–") worksOffline("yes", "All that the page needs is kept: it can be loaded without a server");
  },
  lost(path) {
    worksOffline("no", `${path} could not be kept: the browser or the disk has too little room`);
  },
  missing(path) {
    missing = `${path} is not here: no server answers, and no copy of it was kept; run 'stillgraph serve' again and load the page.`;
  },
  step({ text, ttft, tpot }) {
    if (!answer) return;
    const follows = chat.scrollHeight - chat.scrollTop - chat.clientHeight < 40;
    answer.textContent += text;
    at("ttft").textContent = `${ttft.toFixed(0)} ms`;
    if (tpot !== null) at("tpot").textContent = `${tpot.toFixed(1)} ms`;
    if (follows) chat.scrollTop = chat.scrollHeight;
  },
  done({ reason, memory }) {
    if (answer) messages.push({ role: "assistant", content: answer.textContent });
    if (reason === "context") add("note", "The cache is full: start a new chat.");
    idle();
    measured(memory);
  },
  // {message, fatal: whether nothing can be asked any more}
  error({ message, fatal }) {
    const { content } = messages.pop() ?? {}; // what could not be answered
    if (Array.isArray(content)) files.pop();
    wrong((fatal && missing) || message); // what is missing may be another page's, which one that runs does not need
    if (!fatal) idle();
  },
  golden(line) {
    (globalThis.golden ??= []).push(line);
  },
};

function add(kind, text) {
  const said = document.createElement("p");
  said.className = kind;
  said.textContent = text;
  chat.append(said);
  chat.scrollTop = chat.scrollHeight;
  return said;
}

function wrong(message) {
  at("loading")?.remove();
  if (answer && !answer.textContent) answer.remove();
  add("wrong", message);
  document.body.dataset.state = "wrong";
}

function idle() {
  answer?.classList.remove("running");
  answer = null;
  send.textContent = "Send";
  send.disabled = false;
  again.hidden = !messages.length;
  document.body.dataset.state = "ready";
}

// file: of a picture that the text is about, or undefined.
function ask(text, file) {
  messages.push({ role: "user", content: file ? [{ type: "image" }, { type: "text", text: `\n${text}` }] : text });
  const said = add("user", text);
  if (file) {
    files.push(file);
    const shown = document.createElement("img");
    shown.src = URL.createObjectURL(file);
    shown.alt = file.name;
    said.prepend(shown);
  }
  answer = add("assistant", "");
  answer.classList.add("running");
  send.textContent = "Stop";
  document.body.dataset.state = "busy";
  worker.postMessage(["ask", { prompt: takesChats ? messages : text, files }]);
}

function stop() {
  send.disabled = true; // until the worker's step ends
  answer.classList.remove("running");
  worker.postMessage(["stop"]);
}

function measured(memory) {
  at("memory").textContent = `${(memory / 1e6).toFixed(0)} MB`;
}

function worksOffline(shown, why) {
  at("offline").textContent = shown;
  at("offline").parentElement.title = why;
}

form.onsubmit = (event) => {
  event.preventDefault();
  if (answer) return stop();
  const text = prompt.value.trim();
  if (!text) return;
  const [file] = image.files;
  prompt.value = image.value = "";
  chosen();
  ask(text, file);
};

// The button says which picture goes with the next message.
function chosen() {
  const [file] = image.files;
  at("picture").classList.toggle("chosen", Boolean(file));
  at("picture").title = file ? file.name : "Add a picture";
}

image.onchange = () => {
  chosen();
  prompt.focus();
};

prompt.onkeydown = (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  if (!answer && !send.disabled) form.requestSubmit();
};

again.onclick = () => {
  if (answer) return;
  messages = [];
  files = [];
  chat.replaceChildren();
  again.hidden = true;
};

// For golden.json: its answers come one by one into `golden`, the last is null.
globalThis.runGolden = () => worker.postMessage(["golden"]);

start();
