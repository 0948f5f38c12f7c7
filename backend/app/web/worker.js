// The service worker: answers the page's requests in the server's place, when the server does not
// or must not. The server writes BUILD above, which names the files of the page and the runtime.

import { answer, load } from "./static/recognize.js";

const FACTS = "offline/facts", RUNTIME = "offline/ort-wasm-simd-threaded.wasm";
const STATIC = ["app.js", "offline.js", "style.css", "icon.svg", "manifest.json"];
const PAGE = ["./", ...STATIC.map((name) => `static/${name}`)];
const OURS = "nutrilearn-", PAGES = `${OURS}page-`, MODELS = `${OURS}model-`;
const ONLY_HERE = `${OURS}only-here`; // a cache that only has to exist: workers have no localStorage
const PATIENCE = 4000; // ms until a server that is silent counts as gone

// What is kept ----------------------------------------------------------------------------

self.addEventListener("install", (event) => {
  const requests = [...PAGE, RUNTIME].map((path) => new Request(path, { cache: "reload" }));
  event.waitUntil(caches.open(PAGES + BUILD).then((cache) => cache.addAll(requests)));
  self.skipWaiting();
});

self.addEventListener("activate", (event) => {
  event.waitUntil(Promise.all([removeCaches(PAGES, PAGES + BUILD), self.clients.claim()]));
});

async function removeCaches(prefix, keep) {
  const names = (await caches.keys()).filter((name) => name.startsWith(prefix) && name !== keep);
  await Promise.all(names.map((name) => caches.delete(name)));
}

// The facts are stored last and name the model's file, so with them a model is whole.
async function kept() {
  const response = await caches.match(FACTS);
  return response?.json();
}

let updating = null;

// Keeps the model that the server has now, once, however many ask for it.
function update() {
  updating ??= replaceModel().finally(() => { updating = null; });
  return updating;
}

async function replaceModel() {
  const response = await fetch(FACTS, { cache: "no-store" });
  if (response.status === 404) return turnedOff();
  if (!response.ok) throw new Error((await response.json()).detail);
  const { file, sha256 } = await response.clone().json();
  const model = await caches.open(MODELS + sha256);
  if (!(await model.match(file))) await model.add(new Request(file, { cache: "reload" }));
  await model.put(FACTS, response);
  await removeCaches(MODELS, MODELS + sha256);
}

// The operator has turned this off. The person's choice stays: pages that are open still show it.
async function turnedOff() {
  await Promise.all([removeCaches(PAGES), removeCaches(MODELS)]);
  await self.registration.unregister();
}

// Who answers -----------------------------------------------------------------------------

self.addEventListener("fetch", (event) => {
  const { method, url } = event.request;
  if (!url.startsWith(self.registration.scope)) return;
  const path = url.slice(self.registration.scope.length).split(/[?#]/)[0] || "./";
  if (method === "POST" && path === "api/v1/predict") event.respondWith(predict(event));
  if (method === "POST" && path === "api/v1/feedback") event.respondWith(sendCorrection(event.request));
  if (method !== "GET") return;
  if (PAGE.includes(path)) event.respondWith(serverOr(event, () => caches.match(path)));
  else if (path === "api/v1/model") event.respondWith(serverOr(event, (facts) => json(facts?.model)));
  else if (path.startsWith("api/v1/foods/")) {
    const name = decodeURIComponent(path.split("/").at(-1));
    event.respondWith(serverOr(event, (facts) => json(facts?.foods[name])));
  }
  if (path === "./") event.waitUntil(update().catch(() => {})); // also where offline.js no longer asks
});

// From offline.js: keep the model, if it is not kept already, and say which one is.
self.addEventListener("message", (event) => event.waitUntil(prepare(event.source)));

async function prepare(page) {
  await self.clients.claim(); // also a page that was reloaded past its service worker
  const problem = await update().catch((error) => error.message);
  const facts = await kept();
  page.postMessage(facts ? { version: facts.model.version } : { problem });
}

const json = (value) => value && Response.json(value);

async function serverOr(event, fallback) {
  const asked = fetch(event.request).catch(() => Response.error()); // whose status is 0
  const response = await Promise.race([asked, silence()]);
  if (response?.status && response.status < 500) return response;
  return (await fallback(await kept())) ?? asked;
}

const silence = () => new Promise((resolve) => setTimeout(resolve, PATIENCE));

async function predict(event) {
  const onlyHere = await caches.has(ONLY_HERE), facts = await kept();
  const here = onlyHere || (facts && !(await serverIsReady(event, facts)));
  const response = here ? await answerHere(event.request, facts) : await fetch(event.request);
  const client = await self.clients.get(event.clientId);
  if (response.ok) client?.postMessage({ answeredBy: here ? "here" : "server" });
  return response;
}

// Asked before the photo is sent, so that a photo that is answered here never left.
async function serverIsReady(event, facts) {
  const response = await Promise.race([fetch("ready", { cache: "no-store" }).catch(() => null), silence()]);
  if (!response?.ok) return false;
  if (Number(response.headers.get("X-Model-Version")) !== facts.model.version) {
    event.waitUntil(update().catch(() => {})); // the server has another model now
  }
  return true;
}

let loaded = null; // {sha256, model}: the promise of the loaded model

async function answerHere(request, facts) {
  try {
    if (!facts) throw new Error("the model is not on this device yet, and the photo was not sent");
    if (loaded?.sha256 !== facts.sha256) loaded = { sha256: facts.sha256, model: loadKept(facts) };
    const model = await loaded.model.catch((error) => { loaded = null; throw error; });
    const given = await answer(model, (await request.formData()).get("file"));
    if (new URL(request.url).search) given.activation = { grid: null }; // ?explain=true: not here
    return Response.json(given);
  } catch (error) {
    const unreadable = "this browser cannot read the picture by itself. Save it as JPEG, or ask the server";
    return refusal(error instanceof DOMException ? unreadable : error.message);
  }
}

async function sendCorrection(request) {
  const onlyHere = await caches.has(ONLY_HERE);
  return onlyHere ? refusal("your photo stays on this device, as you chose below") : fetch(request);
}

function refusal(detail) {
  return Response.json({ code: "not_here", detail: `${detail}.` }, { status: 422 });
}

async function loadKept(facts) {
  const files = [await keptFile(PAGES + BUILD, RUNTIME), await keptFile(MODELS + facts.sha256, facts.file)];
  if (!files.every(Boolean)) throw new Error("the browser has removed the model from this device");
  const [runtime, model] = await Promise.all(files.map((file) => file.arrayBuffer()));
  return load(runtime, model, facts);
}

async function keptFile(cacheName, path) {
  return (await caches.open(cacheName)).match(path);
}
