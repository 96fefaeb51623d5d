// Keeps what the page fetches, for when there is no server: what has a hash in its address is taken from there first.

const CACHE = "stillgraph";
const PAGE = ["./", "page.css", "page.js"]; // fetched before this was there
const puts = new Set(); // what is being kept, as promises

self.addEventListener("install", (event) => {
  const kept = caches.open(CACHE).then((cache) => cache.addAll(PAGE));
  event.waitUntil(kept.catch(() => null).then(() => self.skipWaiting())); // the page works without them
});

self.addEventListener("activate", (event) => event.waitUntil(self.clients.claim()));

self.addEventListener("message", (event) => event.waitUntil(settle(event.source)));

self.addEventListener("fetch", (event) => {
  const { request } = event, { origin, pathname, search } = new URL(request.url);
  if (request.method !== "GET" || origin !== location.origin || pathname.startsWith("/v1/")) return;
  const answer = search ? keptFirst(event) : freshFirst(event);
  event.respondWith(answer.catch((error) => tell("missing", request).then(() => Promise.reject(error))));
});

// The page asks, once it has all that it needs; whatever is not kept was told before this is.
async function settle(page) {
  await Promise.all(puts);
  for (const path of PAGE) if (!(await caches.match(path))) await tell("lost", new Request(path));
  page.postMessage(["settled"]);
}

async function keptFirst(event) {
  return (await caches.match(event.request)) ?? fetched(event);
}

async function freshFirst(event) {
  try {
    return await fetched(event);
  } catch (error) {
    const kept = await caches.match(event.request);
    if (kept) return kept;
    throw error;
  }
}

async function fetched(event) {
  const response = await fetch(event.request);
  const put = keep(event.request, response.clone()).finally(() => puts.delete(put));
  puts.add(put);
  event.waitUntil(put);
  return response;
}

async function keep(request, response) {
  const cache = await caches.open(CACHE);
  try {
    if (response.ok) await cache.put(request, response);
    else if (response.status === 404) await cache.delete(request);
  } catch {
    await cache.delete(request); // there is no room for it, or it broke off
    await tell("lost", request);
  }
}

async function tell(kind, { url }) {
  const path = new URL(url).pathname.slice(1) || "The page itself";
  for (const page of await self.clients.matchAll({ type: "window" })) page.postMessage([kind, path]);
}
