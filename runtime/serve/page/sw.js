// Keeps what the page fetches, for when there is no server: what has a hash in its address is taken from there first.

const CACHE = "stillgraph";
const PAGE = ["./", "page.css", "page.js"]; // fetched before this was there

self.addEventListener("install", (event) => {
  event.waitUntil(caches.open(CACHE).then((cache) => cache.addAll(PAGE)).then(() => self.skipWaiting()));
});

self.addEventListener("activate", (event) => event.waitUntil(self.clients.claim()));

self.addEventListener("fetch", (event) => {
  const { request } = event, { origin, pathname, search } = new URL(request.url);
  if (request.method !== "GET" || origin !== location.origin || pathname.startsWith("/v1/")) return;
  event.respondWith(search ? keptFirst(event) : freshFirst(event));
});

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
  const copy = response.clone(), cache = await caches.open(CACHE);
  if (response.ok) event.waitUntil(cache.put(event.request, copy).catch(() => cache.delete(event.request)));
  else if (response.status === 404) event.waitUntil(cache.delete(event.request));
  return response;
}
